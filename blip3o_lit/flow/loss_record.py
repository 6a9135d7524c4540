"""The record of one loss: its terms, and the figures of the log, computed when they are read.

Shapes: x_BND, t_B; B batch, N tokens, D target width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blip3o_lit.flow.path import Path


@dataclass(frozen=True)
class LossRecord:
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
    rows_P: Tensor | None
    """The draws that trained a map; None where there is none to train."""

    def data_mean(self, values_B: Tensor) -> Tensor:
        """Average over the draws whose target is data; not a number without any."""
        if self.rows_P is None:
            return values_B.mean()
        count = len(values_B) - len(self.rows_P)
        return values_B.index_fill(0, self.rows_P, 0).sum() / (count or torch.nan)

    @property
    def pairs_mse(self) -> Tensor | None:
        """Mean squared error of the maps."""
        return None if self.rows_P is None else self.mse_B[self.rows_P].mean()

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
        cosine_B = F.cosine_similarity(implied_BND.flatten(1), velocity_BND.flatten(1))
        return self.data_mean(cosine_B)
