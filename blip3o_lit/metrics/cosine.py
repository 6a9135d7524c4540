"""How near generated tokens are to the true ones: cosine, error and norms.

Everything is computed in raw token space and in float64.
Shape suffixes: B images, N tokens (CLS first where there is one), D token width.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from blip3o_lit.base.shape import TokenShape

THRESHOLDS = (0.7, 0.8, 0.9)
PERCENTILES = (1, 5, 25, 50, 75, 95)
RESAMPLES = 1000
ROUNDING = 1e-12
"""Share of the energy that a mean token in fp32 may leave of the spread of equal tokens."""
_CHUNK = 4_000_000
_SUMS = ("images", "tokens", "centred", "pooled", "patch", "cls", "distance", "error", "energy")
_SUMS += ("spread_true", "spread_generated", "norm_true", "norm_generated")


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine along the last axis; 0 where a vector is zero."""
    norms = a.norm(dim=-1) * b.norm(dim=-1)
    return (a * b).sum(-1) / norms.clamp(min=torch.finfo(a.dtype).tiny)


def interval(values: np.ndarray, seed: int = 0) -> list[float]:
    """Return the ends of the 95 % percentile bootstrap interval of the mean of `values` `[B]`."""
    draws = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // values.size)
    means = []
    for start in range(0, RESAMPLES, chunk):
        rows = min(chunk, RESAMPLES - start)
        means.append(values[draws.integers(0, values.size, (rows, values.size))].mean(1))
    return np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()


class TokenScores(Metric):
    """The scores of one estimator: sums over images, and one cosine per image.

    `cosine` is taken per token (CLS included where the tokens have one), averaged over the tokens
    of an image, then over images. Centred values subtract the training mean token of each position
    (`mean_ND`) from both sides, so that a constant token scores about 0. Pooled values average an
    image's patches first.
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
        # No buffer: a module that is cast to bf16 must not round it.
        self.mean_ND = mean_ND.detach().double()
        sizes: dict[str, tuple[int, ...]] = {f"sum_{name}": () for name in _SUMS}
        sizes |= {"position_N": (shape.tokens,), "square_N": (shape.tokens,)}
        sizes["above_tokens"] = (len(THRESHOLDS),)
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")
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
        mean_ND = self.mean_ND.to(true.device)
        generated_centred, true_centred = generated - mean_ND, true - mean_ND
        error = generated - true
        cosine_BN = cosine(generated, true)
        pooled_B = cosine(generated[:, first:].mean(1), true[:, first:].mean(1))
        sums = {
            "images": len(true),
            "tokens": cosine_BN.sum(),
            "centred": cosine(generated_centred, true_centred).mean(1).sum(),
            "pooled": pooled_B.sum(),
            "patch": cosine_BN[:, first:].mean(1).sum(),
            "cls": cosine_BN[:, :first].sum(),
            "distance": error.norm(dim=-1).sum(),
            "error": error.square().sum(),
            "energy": true.square().sum(),
            "spread_true": true_centred.square().sum(),
            "spread_generated": generated_centred.square().sum(),
            "norm_true": true.norm(dim=-1).sum(),
            "norm_generated": generated.norm(dim=-1).sum(),
        }
        for name, value in sums.items():
            setattr(self, f"sum_{name}", getattr(self, f"sum_{name}") + value)
        self.image_cosine.append(cosine_BN.mean(1))
        self.position_N += cosine_BN.sum(0)
        self.square_N += cosine_BN.square().sum(0)
        self.above_tokens += torch.stack([(cosine_BN > least).sum() for least in THRESHOLDS])

    def compute(self) -> dict[str, Any]:
        """Return every score by its name in `evaluation.json`, and two maps over patch positions.

        `position_cosine` and `position_std` are mean and standard deviation of the cosine over
        images, as rows of the grid.
        """
        total = {name: float(getattr(self, f"sum_{name}")) for name in _SUMS}
        images = total["images"]
        if not images:
            raise ValueError("no images were scored")
        tokens = images * self.shape.tokens
        scores: dict[str, Any] = {
            "images": int(images),
            "cosine": total["tokens"] / tokens,
            "cosine_centred": total["centred"] / images,
            "cosine_pooled": total["pooled"] / images,
            "cosine_patch": total["patch"] / images,
            "cosine_cls": total["cls"] / images if self.shape.cls else None,
            "mse": total["error"] / (tokens * self.shape.width),
            "l2": total["distance"] / tokens,
        }
        scores |= _ratios(total) | _over_images(dim_zero_cat(self.image_cosine).cpu().numpy())
        for threshold, count in zip(THRESHOLDS, self.above_tokens.tolist()):
            scores[f"tokens_above_{threshold}"] = count / tokens
        first = int(self.shape.cls)
        mean_N, square_N = self.position_N[first:] / images, self.square_N[first:] / images
        spread_N = (square_N - mean_N.square()).clamp(min=0).sqrt()
        scores["position_cosine"] = mean_N.reshape(self.shape.grid).tolist()
        scores["position_std"] = spread_N.reshape(self.shape.grid).tolist()
        return scores


def _over_images(cosine_B: np.ndarray) -> dict[str, Any]:
    scores: dict[str, Any] = {
        "cosine_ci95": interval(cosine_B),
        "image_std": float(cosine_B.std(ddof=1)) if len(cosine_B) > 1 else 0.0,
        "min": float(cosine_B.min()),
        "max": float(cosine_B.max()),
    }
    for share in PERCENTILES:
        scores[f"p{share}"] = float(np.percentile(cosine_B, share))
    for threshold in THRESHOLDS:
        scores[f"above_{threshold}"] = float((cosine_B > threshold).mean())
    return scores


def _ratios(total: dict[str, float]) -> dict[str, float | None]:
    """Return quotients of sums, None where the denominator is zero.

    `r2` is one minus the squared error over the squared distance to the mean token. Tokens that are
    the mean token but for rounding have no spread.
    """
    varies = total["spread_true"] >= ROUNDING * total["energy"]
    spread_true = total["spread_true"] if varies else 0.0
    norm = _ratio(total["norm_generated"], total["norm_true"])
    variance = _ratio(total["spread_generated"], spread_true)
    unexplained = _ratio(total["error"], spread_true)
    signal = _ratio(total["energy"], total["error"])
    return {
        "snr_db": 10 * math.log10(signal) if signal else None,
        "r2": None if unexplained is None else 1 - unexplained,
        "norm_ratio": norm,
        "norm_consistency": None if norm is None else 1 - abs(1 - norm),
        "variance_ratio": variance,
        "std_ratio": None if variance is None else math.sqrt(variance),
    }


def _ratio(above: float, below: float) -> float | None:
    return above / below if below else None
