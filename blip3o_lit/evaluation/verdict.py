"""What an evaluation comes to: one phrase, one line beside the baselines, and a guard."""

import math
from typing import Any

from blip3o_lit.config.errors import UserError
from blip3o_lit.report.scores import baseline, inline

WORDS = ((0.8, "excellent"), (0.6, "good"), (0.3, "works"))
REMEDY = "use an earlier checkpoint, or train with a lower optimizer.lr"


def verdict(cosine: float) -> str:
    """Return the seeds' word for a cosine; alone it says little."""
    return next((word for least, word in WORDS if cosine >= least), "failing")


def standing(report: dict[str, Any]) -> str:
    """Return the seeds' word together with its place among the baselines, as one phrase.

    A difference to a baseline counts where its paired 95 % interval over images leaves zero.
    """
    headline = report["headline"]
    phrase = f"{verdict(report['estimators'][headline]['cosine'])} by the seeds' thresholds"
    against = report["against"][headline]
    if not against:
        return f"{phrase}, compared with no baseline"
    below, level = [], []
    for name, difference in against.items():
        low, high = difference["ci95"]
        if high < 0:
            below.append(inline(baseline(name)))
        elif low <= 0:
            level.append(inline(baseline(name)))
    if below:
        phrase += f", below {' and '.join(below)}"
    if level:
        phrase += f", level with {' and '.join(level)}"
    return phrase if below or level else f"{phrase}, above every baseline"


def verdict_note(report: dict[str, Any]) -> str:
    """Return one line that puts the headline cosine beside every baseline's."""
    cosine = report["estimators"][report["headline"]]["cosine"]
    note = f"cosine {cosine:.4f} on {report['images']} {report['split']} images"
    others = [
        f"{inline(baseline(name))} {scores['cosine']:.4f}"
        for name, scores in report["baselines"].items()
    ]
    if not others:
        return f"{note}; no baseline was fitted, so the number says little"
    return f"{note}, against {', '.join(others)}"


def check_finite(value: Any, place: str = "") -> None:
    """Raise if a number in nested dicts and lists is NaN or infinite; `place` says where."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{place}.{key}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            check_finite(item, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{place} is {value}: the checkpoint generates tokens that are not finite: {REMEDY}"
        )
