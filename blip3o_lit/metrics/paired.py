"""Is one model better than another on the same images? A paired comparison of per-image scores."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip3o_lit.metrics.cosine import interval

FLIPS = 10_000
_CHUNK = 4_000_000


def compare(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Compare two models by their scores on the same images, in the same order.

    Args:
        first: Scores `[images]` of the model in question.
        second: Scores of the one it is compared with.
        seed: Seed of the resampling.

    Returns:
        Mean difference (positive: the first is better), its bootstrap interval over images, the
        two-sided p value of a sign-flip test (the difference of each image is as likely to have
        the other sign), and the share of images on which the first is better.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    low, high = interval(difference, seed)
    observed = abs(difference.mean())
    draws = np.random.default_rng(seed)
    step = max(1, _CHUNK // difference.size)
    as_large = 0
    for start in range(0, FLIPS, step):
        signs = draws.integers(0, 2, (min(step, FLIPS - start), difference.size)) * 2 - 1
        # The observed order of signs is among those that could be drawn: allow for rounding.
        as_large += int((np.abs((signs * difference).mean(1)) >= observed * (1 - 1e-12)).sum())
    return {
        "images": int(difference.size),
        "difference": float(difference.mean()),
        "ci95": [low, high],
        "p_value": (as_large + 1) / (FLIPS + 1),
        "wins": float((difference > 0).mean()),
    }
