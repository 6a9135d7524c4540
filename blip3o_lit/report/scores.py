"""Names, order and number formats of the scores; which rows a table has and which comes first."""

import math
from dataclasses import dataclass
from typing import Any

from blip3o_lit.report.record import RunRecord, finite, mapping

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
    apart: bool = False
    """Whether it is scored on other images than the page; its distances don't compare then."""

    def number(self, name: str) -> float | None:
        return finite(self.scores.get(name))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the cosine over images."""
        return ends(self.scores.get("cosine_ci95"))

    def text(self, name: str) -> str:
        if name == "cosine_ci95":
            return "{:.4f}–{:.4f}".format(*self.interval) if self.interval else MISSING
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
        if name == "cosine_ci95" and self.interval:
            value = self.interval[0]
        return "" if value is None else repr(value)


def rows(record: RunRecord) -> list[Row]:
    """Return all rows: the headline, other estimators, baselines from simple to strong, optima."""
    blocks = [
        mapping(record.evaluation.get(name)) for name in ("estimators", "baselines", "optimum")
    ]
    estimators, baselines, optima = blocks
    first, known = str(record.evaluation.get("headline", "mean")), list(BASELINES)
    by_headline = sorted(estimators, key=lambda key: key != first)
    by_strength = sorted(baselines, key=lambda k: known.index(k) if k in known else len(known))
    whole = finite(record.evaluation.get("images"))

    def row(key: str, kind: str, label: str, block: object) -> Row:
        scores = mapping(block)
        images = finite(scores.get("images"))
        apart = None not in (whole, images) and images != whole
        return Row(key, kind, f"{label} ({images:,.0f} images)" if apart else label, scores, apart)

    return [
        *(row(key, "estimator", estimator(key), estimators[key]) for key in by_headline),
        *(row(key, "baseline", baseline(key), baselines[key]) for key in by_strength),
        *(row(key, "optimum", f"Closed form, {key}", optima[key]) for key in optima),
    ]


def headline(rows: list[Row]) -> Row | None:
    """Return the estimator that the tiles speak of; `rows` puts it first."""
    return next((row for row in rows if row.kind == "estimator"), None)


def with_score(name: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row.number(name) is not None]


def source(record: RunRecord, row: Row | None = None) -> str:
    """Return what numbers belong to: estimator, images, split, mode, checkpoint, tokens."""
    about = record.evaluation
    parts: list[str] = []
    if row is not None:
        parts.append(row.label)
        if row.number("nfe") is not None:
            parts.append(f"{row.text('nfe')} NFE")
    images = finite(about.get("images"))
    if images is not None:
        parts.append(f"{images:,.0f} images of {about.get('split', 'an unnamed split')}")
    if about.get("mode"):
        parts.append(str(about["mode"]))
    parts += [f"{key} {str(about[key])[:12]}" for key in ("checkpoint", "tokens") if about.get(key)]
    return ", ".join(parts)


def estimator(key: str) -> str:
    """Return the label of an estimator: `heun-10@1.5` -> `Heun, 10 steps, guidance 1.5`."""
    plain, _, guidance = key.partition("@")
    name, _, steps = plain.partition("-")
    names = {"mean": "Posterior mean", "rk4": "RK4", "ab2": "Adams-Bashforth"}
    names["fitted"] = "Fitted solver"
    label = names.get(name, name.capitalize())
    if steps:
        unit = "evaluation" if name in ("fitted", "map") else "step"
        label += f", {steps} {unit}{'' if steps == '1' else 's'}"
    return f"{label}, guidance {guidance}" if guidance else label


def baseline(key: str) -> str:
    """Return the label of a baseline."""
    return BASELINES.get(key, key.replace("_", " ").capitalize())


def inline(label: str) -> str:
    """Return a label as it stands inside a sentence: `Patch MLP` -> `patch MLP`."""
    return label if label[1:2].isupper() else label[:1].lower() + label[1:]


def ends(value: object) -> tuple[float, float] | None:
    """Return both ends of an interval, or None for anything else."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


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
