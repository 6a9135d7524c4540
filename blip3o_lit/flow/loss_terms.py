"""What a loss consists of: its terms, and the figures of the log, computed when they are read.

Shapes: x_BND, t_B; B batch, N tokens, D target width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_lit.flow.path import Path

# The contrastive temperature of seed 000.
TEMPERATURE = 0.07
# Least length in a cosine, as in torch: that of a zero vector is 0.
TINY = 1e-8


@dataclass(frozen=True)
class LossTerms:
    """One step's loss and what is worth logging; all but `total` are detached."""

    total: Tensor
    """The number to differentiate."""
    mse_B: Tensor
    """Mean squared error of each output, in units of the unscaled target, unweighted."""
    extra: dict[str, Tensor]
    """Further terms of the loss by name (cosine, consistency, ...), before their weights."""
    path: Path
    prediction: str
    y1_BND: Tensor
    z_BND: Tensor
    t_B: Tensor
    x_BND: Tensor
    """x_t on the path from z to y1."""
    target_BND: Tensor
    out_BND: Tensor
    x1_hat_BND: Tensor
    """The estimate of x1, in the tokens that the caller gave."""

    @property
    def mse(self) -> Tensor:
        """Mean squared error of the batch."""
        return self.mse_B.mean()

    @property
    def norm_ratio(self) -> Tensor:
        """Mean token norm of the output over that of its target; 1: neither shrinks nor grows."""
        return self.out_BND.norm(dim=-1).mean() / self.target_BND.norm(dim=-1).mean()

    @property
    def velocity_cosine(self) -> Tensor:
        """Cosine of implied and true velocity, an image's tokens as one vector, mean over B."""
        velocity_BND = self.path.velocity(self.y1_BND, self.z_BND, self.t_B)
        implied_BND = self.path.velocity_from(
            self.prediction, self.out_BND, self.x_BND, self.t_B, check=False
        )
        return F.cosine_similarity(implied_BND.flatten(1), velocity_BND.flatten(1)).mean()


def token_cosine(a_BND: Tensor, b_BND: Tensor) -> Tensor:
    """Return the cosine of each pair of tokens [B, N].

    In fewer passes over all tokens than `F.cosine_similarity`, which divides both by their norms.
    """
    norm = torch.linalg.vector_norm
    lengths_BN = norm(a_BND, dim=-1).clamp_min(TINY) * norm(b_BND, dim=-1).clamp_min(TINY)
    return (a_BND * b_BND).sum(-1) / lengths_BN


def contrastive(estimate_BND: Tensor, true_BND: Tensor) -> Tensor:
    """Return the InfoNCE loss [B]: each estimated token has to be nearest to its own true token.

    Cosines of one image's tokens over the temperature, cross-entropy with the token itself as the
    right answer, mean over the tokens (van den Oord et al. 2018, arXiv:1807.03748).
    """
    estimate_BND, true_BND = F.normalize(estimate_BND, dim=-1), F.normalize(true_BND, dim=-1)
    logits_BNN = estimate_BND @ true_BND.mT / TEMPERATURE
    own_BN = logits_BNN.diagonal(dim1=1, dim2=2)
    return (logits_BNN.logsumexp(-1) - own_BN).mean(1)
