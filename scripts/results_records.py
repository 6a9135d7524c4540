"""What is kept of a run of docs/results.md: docs/results/TESTBED/RECIPE/seed-N.json.

A record holds the settings that the run was made with and the figures that the page reads, so that
the page grows run by run, on whatever machine.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes import RUNS, Run

from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.train import TrainConfig

RECORDS = Path(__file__).resolve().parent.parent / "docs" / "results"
SCORES = (
    *("cosine", "cosine_centred", "mse", "r2", "norm_ratio", "variance_ratio", "frechet"),
    *("frechet_token", "floor_frechet_token", "precision", "recall", "psnr", "images", "nfe"),
    "seconds_per_image",
)
"""Of each estimator and baseline."""
WHOLE = ("nfe_curve", "samples", "swapped", "coverage", "frechet_floor", "images")
DIGITS = 6
DEFAULTS = {"train": asdict(TrainConfig()), "evaluate": asdict(EvaluateConfig(ckpt="RUN"))}
DEFAULTS["first"] = DEFAULTS["train"]
"""By part of the settings."""


def record_of(scores: dict[str, Any]) -> dict[str, Any]:
    """Return what the page reads of an evaluation."""
    kept = {
        kind: {
            name: {key: block[key] for key in SCORES if key in block}
            for name, block in scores.get(kind, {}).items()
        }
        for kind in ("estimators", "baselines", "optimum")
    }
    kept |= {key: scores[key] for key in WHOLE if scores.get(key)}
    kept["against"] = {
        name: {other: {"difference": facts["difference"]} for other, facts in others.items()}
        for name, others in scores.get("against", {}).items()
    }
    if "hidden_half" in scores.get("drawings", {}):
        kept["drawings"] = {"hidden_half": scores["drawings"]["hidden_half"]}
    chosen = scores.get("fitted_solvers", {})
    kept["fitted"] = {
        nfe: {"chosen": fit["chosen"], "seconds": fit["seconds"]} for nfe, fit in chosen.items()
    }
    return rounded(kept)


def rounded(value: Any) -> Any:
    """Return the same with fewer digits, as no table shows more."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def write_record(run: Run, scores: dict[str, Any], facts: dict[str, Any]) -> None:
    """Keep a run; `facts` are how long it took, and where."""
    file = RECORDS / f"{run.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"settings": run.settings(), **facts, "scores": record_of(scores)}
    file.write_text(json.dumps(content) + "\n", "utf-8")


def read_record(run: Run) -> dict[str, Any] | None:
    """Return the scores of a run; None where there is none made with today's settings."""
    file = RECORDS / f"{run.name}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text("utf-8"))
    then = {
        part: with_defaults(values, DEFAULTS[part]) for part, values in record["settings"].items()
    }
    if plain(then) != plain(run.settings()):
        return None
    return {**record["scores"], "training_seconds": record["training_seconds"]}


def with_defaults(settings: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return settings with the defaults of the keys that they are older than."""
    return defaults | {
        key: with_defaults(value, inner) if isinstance(inner := defaults.get(key), dict) else value
        for key, value in settings.items()
    }


def plain(settings: dict[str, Any]) -> Any:
    """Return settings as they are read from a file."""
    return json.loads(json.dumps(settings))


def finished() -> dict[Run, dict[str, Any]]:
    """Return the runs that have a record, in their order, with its scores."""
    found = {run: read_record(run) for run in RUNS}
    return {run: scores for run, scores in found.items() if scores is not None}
