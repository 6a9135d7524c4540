"""Names, order and number formats of the scores; which rows a table has and which comes first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from blip3o_lit.report.record import RunRecord

MISSING = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"

FRECHET = "Fr\N{LATIN SMALL LETTER E WITH ACUTE}chet distance"

BASELINES = {
    "mean_token": "Mean token",
    "ridge": "Ridge",
    "mlp": "Patch MLP",
    "regression": "Noise-free transformer",
}

COLUMNS = {
    "cosine": (
        "Cosine",
        "cosine a token, averaged over tokens, then over images; higher is better",
    ),
    "cosine_ci95": ("95 %", "95 % interval of the cosine over images"),
    "cosine_centred": ("Centred", "cosine after taking the mean training token from both"),
    "cosine_pooled": ("Pooled", "cosine of an image's mean patch"),
    "cosine_cls": ("CLS", "cosine of the CLS token"),
    "mse": ("MSE", "mean squared error in the tower's own units; lower is better"),
    "r2": (
        "R\N{SUPERSCRIPT TWO}",
        "1 - squared error over squared distance to the mean training token",
    ),
    "norm_ratio": ("Norm", "length of the generated tokens over the true ones; 1 is right"),
    "frechet": (
        "Fr\N{LATIN SMALL LETTER E WITH ACUTE}chet",
        "distance between the Gaussians of mean patch tokens, generated and true; lower is better",
    ),
    "nfe": ("NFE", "network evaluations an image"),
}
"""Columns of the main table: key -> (heading, what it means)."""

SPREAD = {
    "image_std": ("Std", "standard deviation of the cosine over images"),
    "p5": ("p5", "5th percentile over images"),
    "p50": ("Median", "median over images"),
    "p95": ("p95", "95th percentile over images"),
    "above_0.7": ("> 0.7", "share of images with a cosine above 0.7"),
    "above_0.8": ("> 0.8", "share of images with a cosine above 0.8"),
    "above_0.9": ("> 0.9", "share of images with a cosine above 0.9"),
}
"""Columns of the second table: how the cosine spreads over images."""


@dataclass(frozen=True)
class Row:
    """One estimator, baseline or closed-form optimum with its scores."""

    key: str
    kind: str
    label: str
    scores: dict[str, Any]

    def number(self, name: str) -> float | None:
        """Return a finite score, or None."""
        return finite(self.scores.get(name))

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the cosine over images."""
        given = self.scores.get("cosine_ci95")
        if not isinstance(given, list) or len(given) != 2:
            return None
        low, high = finite(given[0]), finite(given[1])
        return None if low is None or high is None else (low, high)


def rows(record: RunRecord) -> list[Row]:
    """Return all rows: the headline, other estimators, baselines from simple to strong, optima."""
    found: list[Row] = []
    for kind, block, label in (
        ("estimator", "estimators", estimator),
        ("baseline", "baselines", baseline),
        ("optimum", "optimum", optimum),
    ):
        for key, scores in mapping(record.evaluation.get(block)).items():
            found.append(Row(key, kind, label(key), mapping(scores)))
    kinds, known = ["estimator", "baseline", "optimum"], list(BASELINES)
    first = str(record.evaluation.get("headline", "mean"))
    return sorted(
        found,
        key=lambda row: (
            kinds.index(row.kind),
            row.key != first,
            known.index(row.key) if row.key in known else len(known),
        ),
    )


def headline(found: list[Row]) -> Row | None:
    """Return the estimator that the tiles speak of; `rows` puts it first."""
    return next((row for row in found if row.kind == "estimator"), None)


def estimator(key: str) -> str:
    """Return the label of an estimator: `heun-10@1.5` -> `Heun, 10 steps, guidance 1.5`."""
    plain, _, guidance = key.partition("@")
    name, _, steps = plain.partition("-")
    known = {"mean": "Posterior mean", "rk4": "RK4", "ab2": "Adams-Bashforth"}
    parts = [known.get(name, name.capitalize())]
    parts += [f"{steps} steps"] * bool(steps) + [f"guidance {guidance}"] * bool(guidance)
    return ", ".join(parts)


def baseline(key: str) -> str:
    """Return the label of a baseline."""
    return BASELINES.get(key, key.replace("_", " ").capitalize())


def optimum(key: str) -> str:
    """Return the label of a closed-form optimum."""
    return f"Closed form, {key}"


def finite(value: object) -> float | None:
    """Return a finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def text(name: str, row: Row) -> str:
    """Return a score as the table prints it."""
    if name == "cosine_ci95":
        pair = row.interval
        return f"{pair[0]:.4f}\N{EN DASH}{pair[1]:.4f}" if pair else MISSING
    value = row.number(name)
    if value is None:
        return "not finite" if isinstance(row.scores.get(name), float) else MISSING
    if name == "nfe":
        return f"{value:.4g}"
    if name.startswith("above_"):
        return f"{100 * value:.1f} %"
    return significant(value) if name in ("frechet", "mse") else f"{value:.4f}"


def significant(value: float) -> str:
    """Return a number of unknown size with four significant digits: 12,340, 3.142, 0.00012."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-4:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(size)))}f}"


def signed(difference: float) -> str:
    """Return a difference with its sign: +0.1320."""
    return f"{'+' if difference >= 0 else MINUS}{abs(difference):.4f}"


def inline(label: str) -> str:
    """Return a label as it stands inside a sentence: `Patch MLP` -> `patch MLP`."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def mapping(value: object) -> dict[str, Any]:
    """Return a dict with string keys, empty for anything else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}
