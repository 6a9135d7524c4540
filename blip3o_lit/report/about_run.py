"""The sections about the run itself: training curves, configuration, machine, commands."""

from dataclasses import asdict

from blip3o_lit.base.words import flatten
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.report import charts
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.tables import facts, table
from blip3o_lit.report.templating import Section

CURVES = {
    "loss": ("Loss", "loss", {"training": "train/loss", "validation": "val/loss"}),
    "cosine": ("Cosine", "cosine", {"training": "train/cosine", "validation": "val/cosine"}),
    "lr": ("Learning rate", "learning rate", {"learning rate": "lr"}),
    "grad": ("Gradient norm", "gradient norm", {"gradient norm": "grad_norm"}),
    "tokens": ("Throughput", "tokens per second", {"tokens per second": "tokens_per_s"}),
    "wait": ("Waiting for data", "share of a step", {"data wait": "data_wait"}),
}
"""Name -> title, unit, and the column of metrics.csv of each line's label."""
TIMED = "val/timed_loss_"
LARGE = ("loss", "cosine")


def training(record: RunRecord) -> Section:
    drawn, figures = {}, []
    timed = {
        column.removeprefix(TIMED).replace("t", "t = "): column
        for column in record.metrics
        if column.startswith(f"{TIMED}t")
    }
    curves = CURVES | {"timed": ("Validation loss at fixed times", "loss", timed)}
    for name, (title, unit, columns) in curves.items():
        lines = {label: record.curve(column) for label, column in columns.items()}
        lines = {label: points for label, points in lines.items() if points}
        if lines:
            height = 220 if name in LARGE else 130
            drawn[f"curve-{name}"] = charts.curves(lines, unit, height, decay=name == "loss")
            ends = []
            for label, points in lines.items():
                step, value = points[-1]
                ends.append(f"{label} {value:,.4g} at step {step:,.0f}")
            figure = {"name": f"curve-{name}", "title": title, "ends": "; ".join(ends)}
            figures.append({**figure, "large": name in LARGE})
    return Section("training", "Training", {"figures": figures}, drawn)


def configuration(record: RunRecord) -> Section:
    changed = differences(record)
    data = {
        "overrides": record.overrides,
        "changed": table(["Key", "Default", "This run", "Set by"], changed),
        "text": record.config_text,
    }
    return Section("configuration", "Configuration", data)


def differences(record: RunRecord) -> list[list[str]]:
    """Return key, default, value and origin of everything that is not the schema's default.

    The command line changes what the presets (group options such as model=base) chose.
    """
    typed = {override.lstrip("+~").partition("=")[0] for override in record.overrides}
    defaults = flatten(asdict(TrainConfig()))
    lines = [
        [key, str(defaults[key]), str(value), "command line" if key in typed else "preset"]
        for key, value in flatten(record.config).items()
        if key in defaults and defaults[key] != value
    ]
    return sorted(lines, key=lambda line: (line[3] == "preset", line[0]))


def environment(record: RunRecord) -> Section:
    data = {"result": facts(record.result), "environment": facts(record.environment)}
    return Section("environment", "Environment", data)


def repeat(record: RunRecord) -> Section:
    commit = flatten(record.environment).get("commit") or record.environment.get("git")
    data = {
        "train": record.train_command,
        "evaluate": record.evaluate_command if record.evaluation else None,
        "commit": commit if isinstance(commit, str) else None,
    }
    return Section("repeat", "Do it again", data)
