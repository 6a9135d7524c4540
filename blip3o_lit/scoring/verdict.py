"""What an evaluation comes to: a word, one line beside the baselines, and a guard."""

from __future__ import annotations

import math
from typing import Any

from blip3o_lit.config.errors import UserError

VERDICTS = ((0.8, "excellent"), (0.6, "good"), (0.3, "works"))


def verdict(cosine: float) -> str:
    """Return the seeds' word for a cosine; read it beside the baselines."""
    return next((word for least, word in VERDICTS if cosine >= least), "failing")


def verdict_note(report: dict[str, Any]) -> str:
    """Return one line that puts the headline cosine beside every baseline's."""
    cosine = report["estimators"][report["headline"]]["cosine"]
    where = f"cosine {cosine:.4f} on {report['images']} {report['split']} images"
    others = {name: scores["cosine"] for name, scores in report["baselines"].items()}
    if not others:
        return f"{where}; no baseline was fitted, so the number says little"
    listed = ", ".join(f"{name} {value:.4f}" for name, value in others.items())
    name, best = max(others.items(), key=lambda item: item[1])
    place = "above every baseline" if cosine > best else f"not above {name}"
    return f"{where}, {place} ({listed})"


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
