"""What stands in a run directory, read once and kept as plain values.

Every file may be missing: a run that was stopped, or never evaluated, still has a report. A file
that is there but can't be read is a mistake that the user hears about.
"""

from __future__ import annotations

import csv
import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.files import check_format
from blip3o_lit.config.words import pasteable

FORMAT = 1
"""Format of `evaluation.json`; without a number it is the first."""
ROWS = 600
"""Points kept of a training curve; more can't be told apart on a screen."""


@dataclass(frozen=True)
class RunRecord:
    """The files of one run.

    Attributes:
        path: The run directory.
        evaluation: `evaluation.json`, empty when the run was never evaluated.
        result: `result.json`, empty when the run has not ended.
        environment: `environment.json`.
        job: `job.json` of a sweep's launcher: state and error.
        config: `config.yaml` as nested dicts, interpolations unresolved.
        config_text: `config.yaml` as it stands.
        overrides: The command-line overrides, one an entry.
        metrics: Column name -> [(step, value), ...], finite values only, in the order logged.
    """

    path: Path
    evaluation: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]
    job: dict[str, Any]
    config: dict[str, Any]
    config_text: str
    overrides: list[str]
    metrics: dict[str, list[tuple[float, float]]]

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        """Read a run directory.

        Raises:
            UserError: If `path` is no directory, or one of its files can't be parsed.
        """
        if not path.is_dir():
            raise UserError(f"{path} is not a run directory: name one, such as outputs/<run>")
        config_file = path / "config.yaml"
        return cls(
            path=path,
            evaluation=_evaluation(path / "evaluation.json"),
            result=_json(path / "result.json"),
            environment=_json(path / "environment.json"),
            job=_json(path / "job.json"),
            config=_yaml(config_file),
            config_text=config_file.read_text("utf-8") if config_file.is_file() else "",
            overrides=_lines(path / "overrides.txt"),
            metrics=_columns(path / "metrics.csv"),
        )

    @property
    def name(self) -> str:
        """The run directory's own name."""
        return self.path.resolve().name

    @property
    def train_command(self) -> str:
        """The shell command that trains this run again, from its first step."""
        kept = [word for word in self.overrides if not word.startswith(("resume=", "overwrite="))]
        words = ["python", "-m", "blip3o_lit.train", *kept]
        return " ".join(shlex.quote(word) for word in words)

    @property
    def evaluate_command(self) -> str:
        """The shell command that evaluates this run's best checkpoint."""
        folder = self.path / "checkpoints"
        kept = sorted(folder.glob("*.ckpt"))
        best = [file for file in kept if file.stem == "best"] or kept
        checkpoint = best[-1] if best else folder / "best.ckpt"
        return f"python -m blip3o_lit.evaluate {pasteable('ckpt', checkpoint)} baselines=all"

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return a training curve by its short name, thinned to `ROWS` points by local means.

        Args:
            name: `lr` finds the column `lr` and, failing that, `train/lr`.
        """
        for column in (name, f"train/{name}", f"train_{name}"):
            if column in self.metrics:
                return _thin(self.metrics[column])
        return []


def _evaluation(path: Path) -> dict[str, Any]:
    content = _json(path)
    check_format(path, content.get("format", FORMAT), FORMAT)
    return content


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): write it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object: write it again")
    return content


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, ValueError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML ({first}): write it again") from error
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def _lines(path: Path) -> list[str]:
    """Return the overrides of a file: one a line, Hydra's own `- key=value` lists too."""
    if not path.is_file():
        return []
    lines = (line.strip().removeprefix("- ") for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line and line != "[]"]


def _columns(path: Path) -> dict[str, list[tuple[float, float]]]:
    columns: dict[str, list[tuple[float, float]]] = {}
    if not path.is_file():
        return columns
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, text in row.items():
                value = _number(text)
                if name and name != "step" and value is not None:
                    columns.setdefault(name, []).append((step, value))
    return columns


def _number(text: object) -> float | None:
    """Return a finite float, or None for an empty cell, a word, NaN and infinity."""
    try:
        value = float(str(text))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours until at most `ROWS` points are left."""
    group = math.ceil(len(points) / ROWS)
    if group <= 1:
        return points
    blocks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(block[-1][0], math.fsum(value for _, value in block) / len(block)) for block in blocks]
