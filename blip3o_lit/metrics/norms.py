"""Cosine by the length of the true token, because outlier tokens behave unlike the rest.

ViTs keep global information in a few tokens of high norm (Darcet et al. 2024); an average over all
tokens hides whether those come out right.
Shape suffixes: B images, N tokens, D token width, R ranges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from blip3o_lit.metrics.cosine import cosine

EDGES = (0.8, 1.25, 2.0)
"""Ranges of a patch token's norm over the median norm in its image; above the last: outliers."""


class CosineByNorm(Metric):
    """Share and mean cosine of patch tokens in each range of relative norm."""

    full_state_update = False
    tokens_R: Tensor
    cosine_R: Tensor
    ratio_R: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("tokens_R", "cosine_R", "ratio_R"):
            zeros = torch.zeros(len(EDGES) + 1, dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, generated_BND: Tensor, true_BND: Tensor) -> None:
        """Add patch tokens."""
        generated, true = generated_BND.double(), true_BND.double()
        norm_BN = true.norm(dim=-1)
        relative_BN = norm_BN / norm_BN.median(dim=1, keepdim=True).values.clamp(min=1e-12)
        edges = torch.tensor(EDGES, dtype=torch.float64, device=true.device)
        place = torch.bucketize(relative_BN, edges, right=True).flatten()
        ratio_BN = generated.norm(dim=-1) / norm_BN.clamp(min=1e-12)
        for state, value in (
            (self.tokens_R, torch.ones_like(norm_BN)),
            (self.cosine_R, cosine(generated, true)),
            (self.ratio_R, ratio_BN),
        ):
            state.index_add_(0, place, value.flatten())

    def compute(self) -> list[dict[str, Any]]:
        """Return a row a range that has tokens: bounds, share, cosine and norm ratio."""
        bounds = [(0.0, EDGES[0]), *zip(EDGES, (*EDGES[1:], None))]
        total = float(self.tokens_R.sum())
        return [
            {
                "from": low,
                "to": high,
                "share": float(count) / total,
                "cosine": float(summed / count),
                "norm_ratio": float(ratio / count),
            }
            for (low, high), count, summed, ratio in zip(
                bounds, self.tokens_R, self.cosine_R, self.ratio_R
            )
            if count
        ]
