"""The page of a sweep: every run in one table, what each setting does, the best run's command."""

import csv
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_lit.base.words import flatten
from blip3o_lit.config.errors import UserError
from blip3o_lit.report import charts
from blip3o_lit.report.record import RunRecord, finite, mapping
from blip3o_lit.report.scores import headline, rows, source
from blip3o_lit.report.tables import table
from blip3o_lit.report.templating import Section, write_page

CURVES = 6
"""Learning curves drawn, those of the best runs: as many as the theme has colours."""


@dataclass(frozen=True)
class Trial:
    record: RunRecord
    settings: dict[str, Any]
    """The keys that differ between the runs, with this run's values."""
    score: float | None
    """Held-out cosine."""
    about: str
    """What the score belongs to."""

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def facts(self) -> dict[str, Any]:
        result = self.record.result
        ended = ("finished" if result.get("finished") else "stopped") if result else "no result"
        if self.record.job.get("state") == "failed":
            ended = f"failed: {self.record.job.get('error')}"
        loss, speed = self.record.curve("train/loss"), self.record.curve("tokens_per_s")
        return {
            "ended": ended,
            "step": result.get("step"),
            "loss": loss[-1][1] if loss else None,
            "seconds": finite(result.get("seconds")),
            "tokens_per_s": speed[-1][1] if speed else None,
        }


def write_sweep(sweep_dir: Path) -> Path:
    """Write `sweep.html` and `sweep.csv` into a directory of runs; returns the page's path."""
    folder = Path(sweep_dir)
    trials = read_trials(folder)
    write_table(folder / "sweep.csv", trials)
    top = trials[0]
    opening = {
        "count": len(trials),
        "settings": list(top.settings),
        "best": None if top.score is None else top,
        "won": [f"{key}={_setting(value)}" for key, value in top.settings.items()],
    }
    commands = {"train": top.record.train_command, "evaluate": top.record.evaluate_command}
    sections = [Section("best", "The best run", commands), runs(trials)]
    sections += [part for part in (effects(trials), learning(trials)) if part.charts]
    return write_page("sweep.html.j2", folder / "sweep.html", sections, opening)


def is_sweep(folder: Path) -> bool:
    """Return whether a directory is a sweep: no run itself, with runs below."""
    return not (folder / "config.yaml").is_file() and bool(_run_folders(folder))


def read_trials(folder: Path) -> list[Trial]:
    """Return the runs of a sweep, the best first, those without a score last."""
    records = [RunRecord.load(path) for path in _run_folders(folder)]
    if not records:
        raise UserError(f"{folder} holds no runs: name the directory of a sweep (train -m ...)")
    flat = [flatten(record.config) for record in records]
    keys = dict.fromkeys(key for values in flat for key in values)
    keys = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    score = _held_out if all(record.evaluation for record in records) else _validation
    trials = [
        Trial(record, {key: values.get(key) for key in keys}, *score(record))
        for record, values in zip(records, flat, strict=True)
    ]
    return sorted(trials, key=lambda trial: -math.inf if trial.score is None else trial.score)[::-1]


def write_table(path: Path, trials: list[Trial]) -> None:
    first = trials[0]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *first.settings, "cosine", "cosine_of", *first.facts])
        for trial in trials:
            numbers = [trial.score, trial.about, *trial.facts.values()]
            writer.writerow([trial.name, *trial.settings.values(), *numbers])


def runs(trials: list[Trial]) -> Section:
    lines = []
    for trial in trials:
        score = None if trial.score is None else f"{trial.score:.4f}"
        settings = map(_setting, trial.settings.values())
        lines.append([trial.name, *settings, score, *trial.facts.values()])
    facts = (name.replace("_", " ") for name in trials[0].facts)
    heads = ["Run", *trials[0].settings, "Cosine", *facts]
    return Section("runs", "All runs", {"runs": table(heads, lines)})


def effects(trials: list[Trial]) -> Section:
    scored = [trial for trial in trials if trial.score is not None]
    drawn, figures = {}, []
    for number, key in enumerate(trials[0].settings if len(scored) > 1 else ()):
        points = [(trial.name, trial.settings[key], trial.score or 0.0) for trial in scored]
        drawn[f"setting-{number}"] = charts.effect(key, points)
        figures.append((f"setting-{number}", key))
    return Section("effects", "What the settings do", {"figures": figures}, drawn)


def learning(trials: list[Trial]) -> Section:
    drawn, figures = {}, []
    for column, title in (("train/loss", "Training loss"), ("val/cosine", "Validation cosine")):
        name = column.partition("/")[2]
        lines = {f"run {trial.name}": trial.record.curve(column) for trial in trials[:CURVES]}
        lines = {run: points for run, points in lines.items() if points}
        if lines:
            drawn[f"learning-{name}"] = charts.curves(lines, name, 240, decay=name == "loss")
            figures.append((f"learning-{name}", title, len(lines)))
    return Section("learning", "Learning curves", {"figures": figures}, drawn)


def _run_folders(folder: Path) -> list[Path]:
    folders = [path.parent for path in folder.glob("*/config.yaml")]
    number = {path: int(path.name) if path.name.isdecimal() else -1 for path in folders}
    return sorted(folders, key=lambda path: (number[path], path.name))


def _held_out(record: RunRecord) -> tuple[float | None, str]:
    row = headline(rows(record))
    return (row.number("cosine") if row else None, source(record, row))


def _validation(record: RunRecord) -> tuple[float | None, str]:
    score = finite(mapping(record.result.get("best")).get("cosine"))
    name = record.result.get("estimator", "unnamed")
    return score, f"{name} estimator, best validation while training"


def _setting(value: Any) -> Any:
    number = finite(value)
    return value if number is None else f"{number:g}"
