"""The page of a sweep: every run in one table, what each setting does, the best run's command."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from blip3o_lit.config.errors import UserError
from blip3o_lit.report import charts, html, parallel
from blip3o_lit.report.page import publish, render
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite, headline, mapping, rows
from blip3o_lit.report.section import Section, source

NAME = "sweep.html"
CURVES = 6
"""Learning curves drawn, those of the best runs: as many as the theme has colours."""


@dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
        record: Its files.
        settings: The keys that differ between the runs, with this run's values.
        score: Held-out cosine, or None for a run that has none yet.
        about: What the score belongs to.
    """

    record: RunRecord
    settings: dict[str, Any]
    score: float | None
    about: str

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the table shows beside settings and score."""
        result = self.record.result
        ended = ("finished" if result.get("finished") else "stopped") if result else "no result"
        if self.record.job.get("state") == "failed":
            ended = f"failed: {self.record.job.get('error')}"
        loss = self.record.curve("train/loss")
        speed = self.record.curve("tokens_per_s")
        return {
            "ended": ended,
            "step": result.get("step"),
            "loss": loss[-1][1] if loss else None,
            "seconds": finite(result.get("seconds")),
            "tokens_per_s": speed[-1][1] if speed else None,
        }


def write_sweep(sweep_dir: Path) -> Path:
    """Write `sweep.html` and `sweep.csv` into a sweep's directory.

    Args:
        sweep_dir: A directory whose sub-directories are runs.

    Returns:
        The page's path.

    Raises:
        UserError: If it holds no run, or a file of a run can't be parsed.
    """
    folder = Path(sweep_dir)
    trials = read_trials(folder)
    write_table(folder / "sweep.csv", trials)
    blocks = [best(trials), table(trials), effects(trials), learning(trials)]
    shown = [block for block in blocks if block is not None]
    page = render(
        title=f"{folder.resolve().name}: sweep",
        overline="blip3o_lit sweep report",
        heading=folder.resolve().name,
        lede=lede(trials),
        blocks=shown,
    )
    return publish(folder / NAME, page)


def is_sweep(folder: Path) -> bool:
    """Return whether a directory is a sweep: no run itself, with runs below."""
    return not (folder / "config.yaml").is_file() and bool(_run_folders(folder))


def read_trials(folder: Path) -> list[Trial]:
    """Return the runs of a sweep, the best first, those without a score last."""
    records = [RunRecord.load(path) for path in _run_folders(folder)]
    if not records:
        raise UserError(f"{folder} holds no runs: name the directory of a sweep (train -m ...)")
    flat = [html.flatten(record.config) for record in records]
    keys = [
        key
        for key in dict.fromkeys(key for values in flat for key in values)
        if len({repr(values.get(key)) for values in flat}) > 1
    ]
    evaluated = all(record.evaluation for record in records)
    trials = []
    for record, values in zip(records, flat, strict=True):
        score, about = _held_out(record) if evaluated else _validation(record)
        trials.append(Trial(record, {key: values.get(key) for key in keys}, score, about))
    return sorted(trials, key=lambda trial: -math.inf if trial.score is None else trial.score)[::-1]


def write_table(path: Path, trials: list[Trial]) -> None:
    """Write every run's settings and numbers as CSV."""
    first = trials[0]
    columns = ["run", *first.settings, "cosine", "cosine_of", *first.facts]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for trial in trials:
            numbers = [trial.score, trial.about, *trial.facts.values()]
            writer.writerow([trial.record.name, *trial.settings.values(), *numbers])


def lede(trials: list[Trial]) -> str:
    """Return the opening paragraph: how many runs, over what, and the best."""
    top = trials[0]
    keys = ", ".join(top.settings) or "nothing"
    said = f"{len(trials)} runs over {keys}. "
    if top.score is None:
        return f'<p class="lede">{escape(said)}None has a score yet.</p>'
    won = ", ".join(f"{key}={_setting(value)}" for key, value in top.settings.items())
    return (
        f'<p class="lede">{escape(said)}Best: <strong>{top.score:.4f}</strong> by run '
        f"{escape(top.record.name)}{escape(f' ({won})' if won else '')}.</p>"
        f'<p class="source">Cosine: {escape(top.about)}. The best of many runs is chosen on the '
        "images that score it: its cosine is a little too good.</p>"
    )


def best(trials: list[Trial]) -> Section:
    """Return the commands that repeat and evaluate the best run."""
    top = trials[0].record
    body = html.command(top.train_command, "Train the best run again", "train-command")
    body += html.command(top.evaluate_command, "Evaluate it beside all baselines", "eval-command")
    return Section("best", "The best run", body)


def table(trials: list[Trial]) -> Section:
    """Return the sortable table of all runs."""
    top = trials[0]
    heads = ["Run", *top.settings, "Cosine", *(name.replace("_", " ") for name in top.facts)]
    lines = [
        [
            trial.record.name,
            *(_setting(value) for value in trial.settings.values()),
            None if trial.score is None else f"{trial.score:.4f}",
            *trial.facts.values(),
        ]
        for trial in trials
    ]
    caption = f"All runs; cosine: {escape(top.about)}. Select a heading to sort."
    body = html.plain_table(heads, lines, caption, "runs", sortable=True)
    return Section("runs", "All runs", body, "The same numbers stand in <code>sweep.csv</code>.")


def effects(trials: list[Trial]) -> Section | None:
    """Return parallel coordinates: one line a run through its settings to its cosine."""
    scored = [trial for trial in trials if trial.score is not None]
    if len(scored) < 2 or not scored[0].settings:
        return None
    axes = {
        key.rpartition(".")[2] if _unique(key, scored[0].settings) else key: [
            trial.settings[key] for trial in scored
        ]
        for key in scored[0].settings
    }
    axes["cosine"] = [trial.score for trial in scored]
    names = [trial.record.name for trial in scored]
    caption = f"One line a run, lighter where the cosine is higher. {escape(scored[0].about)}."
    body = html.figure("parallel", caption, "Settings and cosine")
    return Section(
        "effects",
        "What the settings do",
        body,
        charts={"parallel": parallel.coordinates(axes, names)},
    )


def learning(trials: list[Trial]) -> Section | None:
    """Return the learning curves of the best runs."""
    specs: dict[str, dict[str, Any]] = {}
    body = ""
    for name, column, title, unit in (
        ("loss", "train/loss", "Training loss", "loss"),
        ("cosine", "val/cosine", "Validation cosine", "cosine"),
    ):
        series = {
            f"run {trial.record.name}": trial.record.curve(column) for trial in trials[:CURVES]
        }
        series = {run: points for run, points in series.items() if points}
        if series:
            specs[f"learning-{name}"] = charts.curves(series, unit, 240, decay=name == "loss")
            caption = f"The best {len(series)} runs that logged it."
            body += html.figure(f"learning-{name}", caption, title)
    if not specs:
        return None
    return Section("learning", "Learning curves", f'<div class="grid">{body}</div>', charts=specs)


def _run_folders(folder: Path) -> list[Path]:
    found = [path.parent for path in folder.glob("*/config.yaml")] if folder.is_dir() else []
    numbers = {path: (int(path.name) if path.name.isdigit() else -1) for path in found}
    return sorted(found, key=lambda path: (numbers[path], path.name))


def _held_out(record: RunRecord) -> tuple[float | None, str]:
    row = headline(rows(record))
    return (row.number("cosine") if row else None, source(record, row))


def _validation(record: RunRecord) -> tuple[float | None, str]:
    """Return the best validation cosine of training, and what it is of."""
    result = record.result
    score = finite(mapping(result.get("best")).get("cosine"))
    estimator = result.get("estimator", "unnamed")
    return score, f"{estimator} estimator, best validation while training"


def _setting(value: Any) -> Any:
    number = finite(value)
    return value if number is None else f"{number:g}"


def _unique(key: str, settings: dict[str, Any]) -> bool:
    short = key.rpartition(".")[2]
    return sum(other.rpartition(".")[2] == short for other in settings) == 1
