"""Names, order and number formats of the scores; which rows a table has and which comes first."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from blip3o_lit.report.record import RunRecord

MISSING = "–"
FRECHET = "Fréchet distance"
KINDS = ["estimator", "baseline", "optimum"]
BASELINES = {
    "mean_token": "Mean token",
    "ridge": "Ridge",
    "mlp": "Patch MLP",
    "regression": "Noise-free transformer",
}


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
        ends = self.scores.get("cosine_ci95")
        if not isinstance(ends, list) or len(ends) != 2:
            return None
        low, high = finite(ends[0]), finite(ends[1])
        return None if low is None or high is None else (low, high)

    def text(self, name: str) -> str:
        """Return a score as the tables print it."""
        if name == "cosine_ci95":
            return f"{self.interval[0]:.4f}–{self.interval[1]:.4f}" if self.interval else MISSING
        value = self.number(name)
        if value is None:
            return "not finite" if isinstance(self.scores.get(name), float) else MISSING
        if name == "nfe":
            return f"{value:.4g}"
        if name.startswith("above_"):
            return f"{100 * value:.1f} %"
        return significant(value) if name in ("frechet", "mse") else f"{value:.4f}"

    def sort_key(self, name: str) -> str:
        """Return what a column sorts by, empty where there is no number."""
        value = self.number(name)
        if name == "cosine_ci95":
            value = self.interval and self.interval[0]
        return "" if value is None else repr(value)


def rows(record: RunRecord) -> list[Row]:
    """Return all rows: the headline, other estimators, baselines from simple to strong, optima."""
    labels = {"estimator": estimator, "baseline": baseline, "optimum": "Closed form, {}".format}
    blocks = {"estimator": "estimators", "baseline": "baselines", "optimum": "optimum"}
    first, known = str(record.evaluation.get("headline", "mean")), list(BASELINES)
    unsorted = [
        Row(key, kind, labels[kind](key), mapping(scores))
        for kind in KINDS
        for key, scores in mapping(record.evaluation.get(blocks[kind])).items()
    ]

    def place(row: Row) -> tuple[int, bool, int]:
        strength = known.index(row.key) if row.key in known else len(known)
        return KINDS.index(row.kind), row.key != first, strength

    return sorted(unsorted, key=place)


def headline(rows: list[Row]) -> Row | None:
    """Return the estimator that the tiles speak of; `rows` puts it first."""
    return next((row for row in rows if row.kind == "estimator"), None)


def source(record: RunRecord, row: Row | None = None) -> str:
    """Return what numbers belong to: estimator, images, split, mode, checkpoint, tokens."""
    about = record.evaluation
    parts: list[str] = []
    if row is not None:
        parts.append(row.label)
        parts += [f"{row.text('nfe')} NFE"] * (row.number("nfe") is not None)
    images = finite(about.get("images"))
    if images is not None:
        parts.append(f"{images:,.0f} images of {about.get('split', 'an unnamed split')}")
    for key in ("mode", "checkpoint", "tokens"):
        if about.get(key):
            parts.append(str(about[key]) if key == "mode" else f"{key} {str(about[key])[:12]}")
    return ", ".join(parts)


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


def inline(label: str) -> str:
    """Return a label as it stands inside a sentence: `Patch MLP` -> `patch MLP`."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def finite(value: object) -> float | None:
    """Return a finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond what a float holds
        return None


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


def mapping(value: object) -> dict[str, Any]:
    """Return a dict with string keys, empty for anything else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def mappings(value: object) -> list[dict[str, Any]]:
    """Return the dicts of a list, none for anything else."""
    return [mapping(item) for item in value if mapping(item)] if isinstance(value, list) else []
