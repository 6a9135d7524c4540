"""Sections of evaluations that asked for more: samples, times, another run, and all the rest."""

from __future__ import annotations

from html import escape
from typing import Any

from blip3o_lit.report import charts, html
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import estimator, finite, mapping
from blip3o_lit.report.section import Section, source

SHOWN = {
    *(
        "format",
        "split",
        "images",
        "mode",
        "tokens",
        "checkpoint",
        "headline",
        "verdict",
        "standing",
        "verdict_note",
    ),
    *("estimators", "baselines", "optimum", "frechet_floor", "nfe_curve", "position_cosine"),
    *("position_std", "retrieval", "zero_shot", "worst", "examples", "samples", "time_bins"),
    *("paired", "against", "swapped"),
}
"""Blocks of `evaluation.json` that a section of their own shows."""


def further(record: RunRecord) -> list[Section]:
    """Return the sections for which the evaluation has numbers."""
    made = [against(record), samples(record), times(record), paired(record), rest(record)]
    return [section for section in made if section is not None]


def samples(record: RunRecord) -> Section | None:
    """Return how several samples of one condition differ, beside what a calibrated sampler has."""
    block = mapping(record.evaluation.get("samples"))
    numbers = {name: value for name, value in block.items() if name not in ("solver", "images")}
    if not numbers:
        return None
    about = source(record, images=finite(block.get("images")))
    lines = [
        [name.replace("_", " "), value, numbers.get(f"{name}_expected")]
        for name, value in numbers.items()
        if not name.endswith("_expected")
    ]
    solver = escape(estimator(str(block.get("solver", "sample"))))
    table = html.plain_table(
        ["Several samples a condition", "Measured", "If calibrated"],
        lines,
        f"{solver}: {escape(about)}.",
        "samples-table",
    )
    said = "Whether samples spread as much as the truth does, given the condition."
    return Section("samples", "Diversity and calibration", table, said)


def times(record: RunRecord) -> Section | None:
    """Return the loss by time bin: `time_bins` is a list of `{"t": [low, high], "loss": x}`."""
    block = record.evaluation.get("time_bins")
    bins = [mapping(item) for item in block] if isinstance(block, list) else []
    points = []
    for item in bins:
        ends, loss = item.get("t"), finite(item.get("loss"))
        if isinstance(ends, list) and len(ends) == 2 and loss is not None:
            low, high = finite(ends[0]), finite(ends[1])
            if low is not None and high is not None:
                points.append((low, high, loss))
    if not points:
        return None
    about = escape(source(record))
    table = html.plain_table(
        ["From t", "To t", "Loss"], points, "The numbers of this chart.", "time-table"
    )
    body = html.figure(
        "times",
        f"Held-out loss by time; t = 0 is noise, t = 1 is data. {about}.",
        "Loss by time",
        html.details("The numbers of this chart", table),
    )
    return Section("times", "Loss by time", body, charts={"times": charts.bars(points)})


def against(record: RunRecord) -> Section | None:
    """Return the paired differences to the baselines, and what swapped conditions leave."""
    lines = [
        [f"{estimator(name)} - {baseline}", *_difference(found)]
        for name, block in mapping(record.evaluation.get("against")).items()
        for baseline, found in mapping(block).items()
    ]
    if not lines:
        return None
    body = html.plain_table(
        ["Cosine of", *_DIFFERENCE],
        lines,
        f"Differences image by image, bootstrap over images: {escape(source(record))}.",
        "against-table",
    )
    swapped = mapping(record.evaluation.get("swapped"))
    pairs = finite(swapped.get("random_pairs"))
    if pairs is not None:
        rows = [
            [estimator(name), value]
            for name, value in swapped.items()
            if name not in ("images", "random_pairs")
        ]
        rows.append(["two different true images", pairs])
        images = finite(swapped.get("images"))
        body += html.plain_table(
            ["With the condition of another image", "Cosine"],
            rows,
            f"What is left when conditions are swapped: {escape(source(record, images=images))}.",
            "swapped-table",
        )
    return Section("against", "Against the baselines, image by image", body)


def paired(record: RunRecord) -> Section | None:
    """Return the image-by-image comparison with another run."""
    block = mapping(record.evaluation.get("paired"))
    lines = [
        [estimator(name), *_difference(found)]
        for name, found in mapping(block.get("cosine")).items()
    ]
    if not lines:
        return None
    rival = escape(str(block.get("run", "another run")))
    table = html.plain_table(
        ["Estimator", *_DIFFERENCE],
        lines,
        f"Cosine of this run minus that of {rival}, image by image: {escape(source(record))}.",
        "paired-table",
    )
    return Section("paired", f"Against {block.get('run', 'another run')}", table)


_DIFFERENCE = ("Difference", "95 % from", "95 % to", "p", "Share of wins", "Images")


def _difference(found: object) -> list[Any]:
    """Return the cells of a paired comparison, in the order of `_DIFFERENCE`."""
    numbers = mapping(found)
    interval = numbers.get("ci95")
    ends = interval if isinstance(interval, list) and len(interval) == 2 else [None, None]
    first, *others = (numbers.get(key) for key in ("difference", "p_value", "wins", "images"))
    return [first, *ends, *others]


def rest(record: RunRecord) -> Section | None:
    """Return every number of the evaluation that no other section shows."""
    left = {name: value for name, value in record.evaluation.items() if name not in SHOWN}
    if not left:
        return None
    table = html.facts(
        left, f"Further facts of the evaluation: {escape(source(record))}.", "rest-facts"
    )
    return Section("rest", "Other facts", html.details("Other facts of the evaluation", table))
