"""The sections about the run itself: training curves, configuration, machine, commands."""

from __future__ import annotations

from dataclasses import asdict
from html import escape
from typing import Any

from blip3o_lit.config.train import TrainConfig
from blip3o_lit.report import charts, html
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.section import Section


def about_run(record: RunRecord) -> list[Section]:
    """Return the sections that every run has."""
    return [training(record), configuration(record), machine(record), repeat(record)]


LARGE = (
    ("loss", "Loss", "loss", {"training": "train/loss", "validation": "val/loss"}),
    ("cosine", "Cosine", "cosine", {"training": "train/cosine", "validation": "val/cosine"}),
)
SMALL = (
    ("lr", "Learning rate", "learning rate", {"learning rate": "lr"}),
    ("grad", "Gradient norm", "gradient norm", {"gradient norm": "grad_norm"}),
    ("tokens", "Throughput", "tokens a second", {"tokens a second": "tokens_per_s"}),
    ("wait", "Waiting for data", "share of a step", {"data wait": "data_wait"}),
)
"""Curves: name, title, unit, and the label of each column of metrics.csv."""


def training(record: RunRecord) -> Section:
    """Return loss, cosine and machine curves."""
    specs: dict[str, dict[str, Any]] = {}
    body = ""
    for group, place, height in ((LARGE, "grid", 220), (SMALL, "small", 130)):
        figures = ""
        for name, title, unit, columns in group:
            series = {label: record.curve(column) for label, column in columns.items()}
            series = {label: points for label, points in series.items() if points}
            if series:
                specs[f"curve-{name}"] = charts.curves(series, unit, height, decay=name == "loss")
                figures += html.figure(f"curve-{name}", _ends(series), title)
        body += f'<div class="{place}">{figures}</div>'
    if not specs:
        return Section(
            "training",
            "Training",
            '<p class="note">There is no <code>metrics.csv</code> with a logged step in this run '
            "directory.</p>",
        )
    said = "Logged while training ran; the cosines are of the batch or the validation images then."
    return Section("training", "Training", body, said, specs)


def configuration(record: RunRecord) -> Section:
    """Return the overrides and the whole configuration."""
    overrides = "".join(f"<li><code>{escape(word)}</code></li>" for word in record.overrides)
    body = (
        f'<p>Overrides of this run:</p><ul class="words">{overrides}</ul>'
        if overrides
        else '<p class="empty">No overrides: this run used every default.</p>'
    )
    changed = differences(record)
    if changed:
        body += html.plain_table(
            ["Key", "Default", "This run", "Set by"],
            changed,
            "What differs from the defaults; every other key has its default.",
            "difference",
        )
    if record.config_text:
        whole = f"<code>{escape(record.config_text)}</code>"
        body += html.details(
            "The whole configuration",
            f'<pre tabindex="0" aria-label="config.yaml">{whole}</pre>',
        )
    else:
        body += '<p class="empty">There is no <code>config.yaml</code> in this run directory.</p>'
    return Section("configuration", "Configuration", body)


def differences(record: RunRecord) -> list[list[str]]:
    """Return key, default, value and origin of everything that is not the schema's default.

    The command line changes what the presets (group options such as model=base) chose, so the two
    are told apart.
    """
    typed = {override.lstrip("+~").partition("=")[0] for override in record.overrides}
    defaults = html.flatten(asdict(TrainConfig()))
    found = html.flatten(record.config)
    lines: list[list[str]] = []
    for key, value in found.items():
        if key in defaults and defaults[key] != value:
            origin = "command line" if key in typed else "preset"
            lines.append([key, str(defaults[key]), str(value), origin])
    return sorted(lines, key=lambda line: (line[3] == "preset", line[0]))


def machine(record: RunRecord) -> Section:
    """Return how the run ended, and what it ran on."""
    tables, absent = "", ""
    for values, name, title in (
        (record.result, "result.json", "How the run ended"),
        (record.environment, "environment.json", "Environment"),
    ):
        if values:
            identifier = name.partition(".")[0] + "-facts"
            caption = f"{title}, from <code>{name}</code>."
            tables += html.facts(values, caption, identifier)
        else:
            absent += f'<p class="empty">There is no <code>{name}</code> in this run directory.</p>'
    return Section("environment", "Environment", f'<div class="grid">{tables}</div>{absent}')


def repeat(record: RunRecord) -> Section:
    """Return the commands that train and evaluate this run again."""
    body = html.command(record.train_command, "Train this run again", "train-command")
    if record.evaluation:
        body += html.command(record.evaluate_command, "Evaluate it again", "evaluate-command")
    commit = html.flatten(record.environment).get("commit") or record.environment.get("git")
    said = f"At commit <code>{escape(str(commit))}</code>." if isinstance(commit, str) else ""
    return Section("repeat", "Do it again", body, said)


def _ends(series: dict[str, list[tuple[float, float]]]) -> str:
    """Return in words where each curve ends."""
    ends = [
        f"{label} {points[-1][1]:,.4g} at step {points[-1][0]:,.0f}"
        for label, points in series.items()
    ]
    return escape(f"Ends at: {'; '.join(ends)}.")
