"""Cosine by the length of the true token, because outlier tokens behave unlike the rest.

ViTs keep global information in a few tokens of high norm (Darcet et al. 2024); an average over all
tokens hides whether those come out right.
Shape suffixes: B images, N tokens, D token width, R ranges.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from blip3o_lit.metrics.cosine import cosine

BOUNDS = ((0.0, 0.8), (0.8, 1.25), (1.25, 2.0), (2.0, None))
"""Ranges of a patch token's norm over the median norm in its image; the last holds outliers."""


class CosineByNorm(Metric):
    """Share, mean cosine and norm ratio of the patch tokens in each range of relative norm."""

    full_state_update = False
    tokens_R: Tensor
    cosine_R: Tensor
    ratio_R: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("tokens_R", "cosine_R", "ratio_R"):
            zeros = torch.zeros(len(BOUNDS), dtype=torch.float64)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(self, generated_BND: Tensor, true_BND: Tensor) -> None:
        generated, true = generated_BND.double(), true_BND.double()
        norm_BN = true.norm(dim=-1)
        relative_BN = norm_BN / norm_BN.median(dim=1, keepdim=True).values.clamp(min=1e-12)
        edges = [low for low, _ in BOUNDS[1:]]
        edges = torch.tensor(edges, dtype=torch.float64, device=true.device)
        place = torch.bucketize(relative_BN, edges, right=True).flatten()
        cosine_BN = cosine(generated, true)
        ratio_BN = generated.norm(dim=-1) / norm_BN.clamp(min=1e-12)
        self.tokens_R += torch.bincount(place, minlength=len(BOUNDS))
        self.cosine_R += torch.bincount(place, cosine_BN.flatten(), len(BOUNDS))
        self.ratio_R += torch.bincount(place, ratio_BN.flatten(), len(BOUNDS))

    def compute(self) -> list[dict[str, Any]]:
        """Return a row per range that has tokens."""
        shares = (self.tokens_R / self.tokens_R.sum()).tolist()
        cosines = (self.cosine_R / self.tokens_R).tolist()
        ratios = (self.ratio_R / self.tokens_R).tolist()
        return [
            {"from": low, "to": high, "share": share, "cosine": mean, "norm_ratio": ratio}
            for (low, high), share, mean, ratio in zip(BOUNDS, shares, cosines, ratios)
            if share
        ]
