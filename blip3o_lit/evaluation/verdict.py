"""What an evaluation comes to: one phrase, one line beside the baselines, and a guard."""

from __future__ import annotations

import math
from typing import Any

from blip3o_lit.config.errors import UserError
from blip3o_lit.report.scores import baseline, inline

WORDS = ((0.8, "excellent"), (0.6, "good"), (0.3, "works"))


def word(cosine: float) -> str:
    """Return the seeds' word for a cosine; alone it says little."""
    return next((name for least, name in WORDS if cosine >= least), "failing")


def verdict(report: dict[str, Any]) -> str:
    """Return the seeds' word for the headline's cosine."""
    return word(report["estimators"][report["headline"]]["cosine"])


def standing(report: dict[str, Any]) -> str:
    """Return the seeds' word together with its place among the baselines, as one phrase.

    A difference to a baseline counts where its paired 95 % interval over images leaves zero.
    """
    said = f"{verdict(report)} by the seeds' thresholds"
    against = report["against"][report["headline"]]
    if not against:
        return f"{said}, compared with no baseline"
    below = [inline(baseline(name)) for name, found in against.items() if found["ci95"][1] < 0]
    level = [
        inline(baseline(name))
        for name, found in against.items()
        if found["ci95"][0] <= 0 <= found["ci95"][1]
    ]
    places = [
        f"{place} {' and '.join(names)}"
        for place, names in (("below", below), ("level with", level))
        if names
    ]
    return f"{said}, {', '.join(places) or 'above every baseline'}"


def verdict_note(report: dict[str, Any]) -> str:
    """Return one line that puts the headline cosine beside every baseline's."""
    cosine = report["estimators"][report["headline"]]["cosine"]
    where = f"cosine {cosine:.4f} on {report['images']} {report['split']} images"
    others = {name: scores["cosine"] for name, scores in report["baselines"].items()}
    if not others:
        return f"{where}; no baseline was fitted, so the number says little"
    listed = ", ".join(f"{inline(baseline(name))} {value:.4f}" for name, value in others.items())
    return f"{where}, against {listed}"


def check_finite(value: Any, place: str) -> None:
    """Raise if a number in nested dicts and lists is NaN or infinite; `place` says where."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_finite(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list):
        for item in value:
            check_finite(item, place)
    elif isinstance(value, float) and not math.isfinite(value):
        raise UserError(
            f"{place} is {value}: the checkpoint generates tokens that are not finite: use an "
            "earlier checkpoint, or train with a lower optimizer.lr"
        )
