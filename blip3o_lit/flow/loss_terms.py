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
class Parts:
    """One step's tensors, without a graph: what is logged now and then is computed then."""

    path: Path
    prediction: str
    y1_BND: Tensor
    z_BND: Tensor
    t_B: Tensor
    x_BND: Tensor
    target_BND: Tensor
    out_BND: Tensor
    x1_hat_BND: Tensor


@dataclass(frozen=True)
class LossTerms:
    """One step's loss and what is worth logging; all but `total` are detached."""

    total: Tensor
    """The number to differentiate."""
    mse: Tensor
    """Mean squared error of the output, in units of the unscaled target, unweighted."""
    mse_B: Tensor
    """The same for each sample."""
    extra: dict[str, Tensor]
    """Further terms of the loss by name (cosine, consistency, ...), before their weights."""
    parts: Parts
    """What the figures below are read from."""

    @property
    def x1_hat_BND(self) -> Tensor:
        """The estimate of x1, in the tokens that the caller gave."""
        return self.parts.x1_hat_BND

    @property
    def norm_ratio(self) -> Tensor:
        """Mean token norm of the output over that of its target; 1: neither shrinks nor grows."""
        norms = [
            tokens.norm(dim=-1).mean() for tokens in (self.parts.out_BND, self.parts.target_BND)
        ]
        return norms[0] / norms[1]

    @property
    def velocity_cosine(self) -> Tensor:
        """Cosine of implied and true velocity, a sample's tokens as one vector, mean over B."""
        parts = self.parts
        velocity_BND = parts.path.velocity(parts.y1_BND, parts.z_BND, parts.t_B)
        implied_BND = parts.path.velocity_from(
            parts.prediction, parts.out_BND, parts.x_BND, parts.t_B, check=False
        )
        return F.cosine_similarity(implied_BND.flatten(1), velocity_BND.flatten(1)).mean()


def token_cosine(a_BND: Tensor, b_BND: Tensor) -> Tensor:
    """Return the cosine of each pair of tokens [B, N].

    `F.cosine_similarity` divides both by their norms first: twice the passes over all tokens,
    forward and backward.
    """
    norm = torch.linalg.vector_norm
    lengths_BN = norm(a_BND, dim=-1).clamp_min(TINY) * norm(b_BND, dim=-1).clamp_min(TINY)
    return (a_BND * b_BND).sum(-1) / lengths_BN


def contrastive(estimate_BND: Tensor, true_BND: Tensor) -> Tensor:
    """Return the InfoNCE loss [B]: each estimated token has to be nearest to its own true token.

    Cosines of one image's tokens over the temperature, cross-entropy with the token itself as the
    right answer, mean over the tokens (van den Oord et al. 2018, arXiv:1807.03748).
    """
    pair = F.normalize(estimate_BND, dim=-1), F.normalize(true_BND, dim=-1)
    logits_BNN = pair[0] @ pair[1].mT / TEMPERATURE
    own_BN = logits_BNN.diagonal(dim1=1, dim2=2)
    return (logits_BNN.logsumexp(-1) - own_BN).mean(1)
