"""What the finished runs of docs/results.md say: by recipe and testbed, over seeds, as tables."""

from __future__ import annotations

import math
from statistics import mean
from typing import Any

from recipes import Recipe, Run

Found = dict[Run, dict[str, Any]]
"""The evaluation of each finished run."""
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}
"""Two-sided 95 % quantile of Student's t by degrees of freedom."""


def scores_of(found: Found, recipe: Recipe, testbed: str) -> list[dict[str, Any]]:
    """Return the evaluations of a recipe on a testbed, a seed each."""
    return list(by_seed(found, recipe, testbed).values())


def by_seed(found: Found, recipe: Recipe, testbed: str) -> dict[int, dict[str, Any]]:
    """Return the evaluations of a recipe on a testbed by seed."""
    return {
        run.seed: scores
        for run, scores in found.items()
        if (run.recipe, run.testbed) == (recipe, testbed)
    }


def estimator(scores: dict[str, Any], name: str, key: str = "cosine") -> float | None:
    """Return a figure of an estimator; None where it was not scored."""
    return scores["estimators"].get(name, {}).get(key)


def over_seeds(values: list[float | None]) -> str:
    """Return the mean and, with more than one seed, half the range."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "-"
    half = (max(numbers) - min(numbers)) / 2
    return f"{mean(numbers):.4f}" + (f" ({half:.4f})" if len(numbers) > 1 else "")


def interval(values: list[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None for less than two values."""
    count = len(values)
    if count < 2:
        return None
    spread = math.sqrt(sum((value - mean(values)) ** 2 for value in values) / (count - 1))
    half = T_95[count - 1] * spread / math.sqrt(count)
    return mean(values) - half, mean(values) + half


def gains(found: Found, recipe: Recipe, base: Recipe, testbed: str, name: str) -> list[float]:
    """Return by how much an estimator is better than another recipe's, for each seed of both.

    The mean is compared in cosine, samples in the logarithm of their token Frechet distance: a
    sample whose cosine is higher than a true sample's is not better.
    """
    of_base = by_seed(found, base, testbed)
    pairs = [
        (scores["estimators"][name], of_base[seed]["estimators"][name])
        for seed, scores in by_seed(found, recipe, testbed).items()
        if seed in of_base and name in scores["estimators"]
    ]
    if name == "mean":
        return [ours["cosine"] - theirs["cosine"] for ours, theirs in pairs]
    return [math.log(theirs["frechet_token"] / ours["frechet_token"]) for ours, theirs in pairs]


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table and an empty one."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]
