"""How near generated tokens are to the true ones: cosine, error and norms.

Shape suffixes: B images, N tokens (CLS first where there is one), D token width.
Everything is computed in raw token space and in float64.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from blip3o_lit.base.shape import TokenShape

THRESHOLDS = (0.7, 0.8, 0.9)
RESAMPLES = 1000
ROUNDING = 1e-12
"""Share of the energy that a mean token in fp32 may leave of the spread of equal tokens."""
_SUMS = ("images", "tokens", "centred", "pooled", "patch", "cls", "distance", "error", "energy")
_SUMS += ("spread_true", "spread_generated", "norm_true", "norm_generated")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine along the last axis; 0 where a vector is zero."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / norms.clamp(min=torch.finfo(a.dtype).tiny)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values` `[images]`."""
    draws = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // values.size)
    means = [
        values[draws.integers(0, values.size, (min(chunk, RESAMPLES - start), values.size))].mean(1)
        for start in range(0, RESAMPLES, chunk)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)


class TokenScores(Metric):
    """The scores of one estimator: sums over images, and one cosine an image.

    `cosine` is taken per token (CLS included where the tokens have one), averaged over the tokens
    of an image, then over images. Centred values subtract the training mean token of each position
    from both sides, so that a constant token scores about 0. Pooled values average an image's
    patches first.

    Args:
        mean_ND: Mean training token of each position.
        shape: Grid, CLS and width of the tokens.
    """

    full_state_update = False
    higher_is_better = True
    mean_ND: Tensor
    position_N: Tensor
    square_N: Tensor
    above_tokens: Tensor
    image_cosine: list[Tensor]

    def __init__(self, mean_ND: Tensor, shape: TokenShape) -> None:
        super().__init__()
        if mean_ND.shape != (shape.tokens, shape.width):
            raise ValueError(
                f"mean token is {tuple(mean_ND.shape)}, expected {(shape.tokens, shape.width)}"
            )
        self.shape = shape
        self.mean_ND = (
            mean_ND.detach().double()
        )  # no buffer: a module cast to bf16 must not round it
        zero = torch.zeros((), dtype=torch.float64)
        for name in _SUMS:
            self.add_state(f"sum_{name}", zero.clone(), dist_reduce_fx="sum")
        per_token = torch.zeros(shape.tokens, dtype=torch.float64)
        self.add_state("position_N", per_token, dist_reduce_fx="sum")
        self.add_state("square_N", per_token.clone(), dist_reduce_fx="sum")
        shares = torch.zeros(len(THRESHOLDS), dtype=torch.float64)
        self.add_state("above_tokens", shares, dist_reduce_fx="sum")
        self.add_state("image_cosine", [], dist_reduce_fx="cat")

    def update(
        self, generated_BND: Tensor, true_BND: Tensor, valid_B: Tensor | None = None
    ) -> None:
        """Add a batch of raw tokens; images with `valid_B` False are left out."""
        if valid_B is not None:
            generated_BND, true_BND = generated_BND[valid_B], true_BND[valid_B]
        if not len(generated_BND):
            # A rank of padding alone still takes part when the ranks' images are gathered.
            self.image_cosine.append(generated_BND.new_zeros(0, dtype=torch.float64))
            return
        first = int(self.shape.cls)
        generated, true = generated_BND.double(), true_BND.double()
        error = generated - true
        cosine_BN = cosine(generated, true)
        image_B = cosine_BN.mean(1)
        self.image_cosine.append(image_B)
        self.position_N += cosine_BN.sum(0)
        self.square_N += cosine_BN.square().sum(0)
        self._add("images", torch.tensor(len(true)))
        self._add("tokens", cosine_BN.sum())
        self._add("patch", cosine_BN[:, first:].mean(1).sum())
        if first:
            self._add("cls", cosine_BN[:, 0].sum())
        self._add("pooled", cosine(generated[:, first:].mean(1), true[:, first:].mean(1)).sum())
        self._add("distance", error.norm(dim=-1).sum())
        self._add("error", error.square().sum())
        self._add("energy", true.square().sum())
        self._add("norm_true", true.norm(dim=-1).sum())
        self._add("norm_generated", generated.norm(dim=-1).sum())
        for index, threshold in enumerate(THRESHOLDS):
            self.above_tokens[index] += (cosine_BN > threshold).sum()
        mean_ND = self.mean_ND.to(true.device)
        generated, true = generated - mean_ND, true - mean_ND
        self._add("centred", cosine(generated, true).mean(1).sum())
        self._add("spread_true", true.square().sum())
        self._add("spread_generated", generated.square().sum())

    def _add(self, name: str, value: Tensor) -> None:
        total = getattr(self, f"sum_{name}")
        setattr(self, f"sum_{name}", total + value.to(total))

    def compute(self) -> dict[str, Any]:
        """Return every score by the names of `evaluation.json`, and two maps over positions.

        `position_cosine` and `position_std` are mean and standard deviation over images of the
        cosine of each patch position, as rows of the grid.

        `r2` (one minus the squared error over the squared distance to the mean token) and the
        ratios are None where their denominator is zero; tokens that are the mean token but for
        rounding have no spread.
        """
        total = {name: float(getattr(self, f"sum_{name}")) for name in _SUMS}
        images = total["images"]
        if not images:
            raise ValueError("no images were scored")
        tokens = images * self.shape.tokens
        values = dim_zero_cat(self.image_cosine).cpu().numpy()
        low, high = interval(values)
        p1, p5, p25, p50, p75, p95 = np.percentile(values, [1, 5, 25, 50, 75, 95]).tolist()
        ratio = _ratio(total["norm_generated"], total["norm_true"])
        if total["spread_true"] < ROUNDING * total["energy"]:
            total["spread_true"] = 0.0
        spread = _ratio(total["spread_generated"], total["spread_true"])
        explained = _ratio(total["error"], total["spread_true"])
        noise = _ratio(total["energy"], total["error"])
        scores: dict[str, Any] = {
            "images": int(images),
            "cosine": total["tokens"] / tokens,
            "cosine_ci95": [low, high],
            "cosine_centred": total["centred"] / images,
            "cosine_pooled": total["pooled"] / images,
            "cosine_patch": total["patch"] / images,
            "cosine_cls": total["cls"] / images if self.shape.cls else None,
            "image_std": float(values.std(ddof=1)) if images > 1 else 0.0,
            "min": float(values.min()),
            "p1": p1,
            "p5": p5,
            "p25": p25,
            "p50": p50,
            "p75": p75,
            "p95": p95,
            "max": float(values.max()),
            "mse": total["error"] / (tokens * self.shape.width),
            "l2": total["distance"] / tokens,
            "snr_db": 10 * math.log10(noise) if noise else None,
            "r2": None if explained is None else 1 - explained,
            "norm_ratio": ratio,
            "norm_consistency": None if ratio is None else 1 - abs(1 - ratio),
            "variance_ratio": spread,
            "std_ratio": None if spread is None else math.sqrt(spread),
        }
        for index, threshold in enumerate(THRESHOLDS):
            scores[f"above_{threshold}"] = float((values > threshold).mean())
            scores[f"tokens_above_{threshold}"] = float(self.above_tokens[index]) / tokens
        first = int(self.shape.cls)
        map_N, square_N = self.position_N[first:] / images, self.square_N[first:] / images
        spread_N = (square_N - map_N.square()).clamp(min=0).sqrt()
        scores["position_cosine"] = map_N.reshape(self.shape.grid).tolist()
        scores["position_std"] = spread_N.reshape(self.shape.grid).tolist()
        return scores


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
