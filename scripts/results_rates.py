"""The learning rate over widths: the table of the sweep, and how far `optimizer.lr=auto` is off."""

from __future__ import annotations

import math

from recipes import GRID, RATES, RATES_TRIED
from results_found import Found, estimator, scores_of, table

from blip3o_lit.config.rate import BEST, auto_rate

STEP = math.log(1.4)
"""Between neighbours of the grid, in logarithms."""


def cosines(found: Found, optimizer: str, width: int) -> dict[str, float]:
    """Return the mean's cosine at each rate that was run, from the lowest rate up."""
    scored = {
        rate: estimator(scores, "mean")
        for rate in RATES_TRIED[optimizer][width]
        for scores in scores_of(found, RATES[optimizer, width, rate], "demo")
    }
    return {rate: value for rate, value in scored.items() if value is not None}


def best_of(scored: dict[str, float]) -> str:
    return max(scored, key=lambda rate: scored[rate])


def enclosed(scored: dict[str, float]) -> bool:
    """Whether a lower and a higher rate than the best were run, so that it is the best of all."""
    return best_of(scored) not in (min(scored, key=float), max(scored, key=float))


def steps_off(optimizer: str, width: int, best: str) -> float:
    """Return how many steps of the grid a rate lies above `auto`."""
    return math.log(float(best) / auto_rate(optimizer, "dit", width)) / STEP


def rates(found: Found) -> list[str]:
    lines: list[str] = []
    for optimizer, tried in RATES_TRIED.items():
        rows = [
            _row(optimizer, width, scored)
            for width in tried
            if (scored := cosines(found, optimizer, width))
        ]
        if rows:
            heads = ["width", *GRID, "auto", "from auto to the best"]
            lines += [f"### {optimizer}", "", *table(heads, rows)]
    if not lines:
        return []
    return [
        "## Learning rate over widths",
        "",
        "The mean's cosine after 120 steps of 8 images of a network of two blocks, one seed. The",
        "best rate falls with the width, and `optimizer.lr=auto` ([Sweeps](sweeps.md)), a power of",
        "the width through these, with it. The last column is in steps of the grid; where the best",
        "is the lowest or highest rate that was run, it says no more than the side it lies on.",
        "",
        *lines,
    ]


def _row(optimizer: str, width: int, scored: dict[str, float]) -> list[str]:
    best = best_of(scored)
    cells = [f"{scored[rate]:.4f}" if rate in scored else "" for rate in GRID]
    cells = [f"**{cell}**" if rate == best else cell for rate, cell in zip(GRID, cells)]
    if (optimizer, "dit") not in BEST:
        return [str(width), *cells, "", ""]
    side = "" if enclosed(scored) else ">= " if best == max(scored, key=float) else "<= "
    off = f"{side}{steps_off(optimizer, width, best):+.1f}"
    return [str(width), *cells, f"{auto_rate(optimizer, 'dit', width):g}", off]
