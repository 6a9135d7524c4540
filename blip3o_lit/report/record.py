"""What stands in a run directory, read once and kept as plain values.

Every file may be missing: a run that was stopped, or never evaluated, still has a report. A file
that is there but can't be read is a mistake that the user hears about.
"""

from __future__ import annotations

import csv
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError

from blip3o_lit.base.files import check_format, read_json
from blip3o_lit.base.words import override
from blip3o_lit.config.errors import UserError

FORMAT = 1
"""Format of `evaluation.json`; without a number it is the first."""
ROWS = 600
"""Points of a training curve, at most; more can't be told apart on a screen."""

Curve = list[tuple[float, float]]
"""Steps and values."""


@dataclass(frozen=True)
class RunRecord:
    """The files of one run; of a file that is missing, nothing."""

    path: Path
    evaluation: dict[str, Any]
    result: dict[str, Any]
    environment: dict[str, Any]
    job: dict[str, Any]
    """State and error, by a sweep's launcher."""
    config: dict[str, Any]
    """`config.yaml` as nested dicts, interpolations unresolved."""
    config_text: str
    overrides: list[str]
    metrics: dict[str, Curve]
    """The finite values of each column of `metrics.csv`."""

    @classmethod
    def load(cls, path: Path) -> RunRecord:
        if not path.is_dir():
            raise UserError(f"{path} is not a run directory: name one, such as outputs/<run>")
        names = ("evaluation", "result", "environment", "job")
        files = {name: read_json(path / f"{name}.json", "write it again") for name in names}
        check_format(path / "evaluation.json", files["evaluation"].get("format", FORMAT), FORMAT)
        config = path / "config.yaml"
        return cls(
            path,
            **files,
            config=_yaml(config),
            config_text=_text(config),
            overrides=_overrides(path / "overrides.txt"),
            metrics=_columns(path / "metrics.csv"),
        )

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def train_command(self) -> str:
        """The shell command that trains this run again, from its first step."""
        words = [w for w in self.overrides if not w.startswith(("resume=", "overwrite="))]
        return shlex.join(["python", "-m", "blip3o_lit.train", *words])

    @property
    def evaluate_command(self) -> str:
        """The shell command of the evaluation; before there is one, of the best checkpoint's."""
        folder = self.path / "checkpoints"
        files = [folder / "best.ckpt", *sorted(folder.glob("*.ckpt"), reverse=True)]
        checkpoint = next((file for file in files if file.exists()), files[0])
        words = self.evaluation.get("overrides", ["baselines=all"])
        ckpt = self.evaluation.get("ckpt", checkpoint)
        return shlex.join(["python", "-m", "blip3o_lit.evaluate", override("ckpt", ckpt), *words])

    def curve(self, name: str) -> Curve:
        """Return a training curve by its short name, thinned to `ROWS` points by local means.

        `lr` finds the column `lr` and, failing that, `train/lr`.
        """
        for column in (name, f"train/{name}", f"train_{name}"):
            if column in self.metrics:
                return _thin(self.metrics[column])
        return []


def finite(value: object) -> float | None:
    """Return a finite float, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond what a float holds
        return None


def mapping(value: object) -> dict[str, Any]:
    """Return a dict with string keys, empty for anything else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, dict) else {}


def mappings(value: object) -> list[dict[str, Any]]:
    """Return the dicts of a list, none for anything else."""
    return [mapping(item) for item in value if mapping(item)] if isinstance(value, list) else []


def _text(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


def _yaml(path: Path) -> dict[str, Any]:
    try:
        config = OmegaConf.load(path) if path.is_file() else OmegaConf.create()
        return mapping(OmegaConf.to_container(config, resolve=False))
    except (YAMLError, ValueError, OSError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"{path} is not valid YAML ({first}): write it again") from error


def _overrides(path: Path) -> list[str]:
    """Return the overrides of a file: one per line, Hydra's own `- key=value` lists too."""
    lines = (line.strip().removeprefix("- ") for line in _text(path).splitlines())
    return [line for line in lines if line and line != "[]"]


def _columns(path: Path) -> dict[str, Curve]:
    columns: dict[str, Curve] = {}
    for row in csv.DictReader(_text(path).splitlines()):
        step = _number(row.pop("step", None))
        for name, text in row.items():
            value = _number(text)
            if name and step is not None and value is not None:
                columns.setdefault(name, []).append((step, value))
    return columns


def _number(text: object) -> float | None:
    try:
        return finite(float(str(text)))
    except ValueError:
        return None


def _thin(points: Curve) -> Curve:
    """Average neighbours until at most `ROWS` points are left."""
    group = math.ceil(len(points) / ROWS) or 1
    blocks = [points[start : start + group] for start in range(0, len(points), group)]
    return [(block[-1][0], math.fsum(value for _, value in block) / len(block)) for block in blocks]
