"""Is one model better than another on the same images? A paired comparison of per-image scores."""

from typing import Any

import numpy as np

from blip3o_lit.metrics.cosine import interval

FLIPS = 10_000
_CHUNK = 4_000_000


def compare(first: np.ndarray, second: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Compare two models by their scores `[images]` on the same images, in the same order.

    The p value is that of a two-sided sign-flip test: under equal models each image's difference
    is as likely to have the other sign. The interval is a bootstrap over images. A positive
    difference and `wins`, a share of images, speak for the first model.
    """
    difference = np.asarray(first, np.float64) - np.asarray(second, np.float64)
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
        "ci95": interval(difference, seed),
        "p_value": (as_large + 1) / (FLIPS + 1),
        "wins": float((difference > 0).mean()),
    }
