"""The sections about held-out numbers: result, position map, sampling, retrieval."""

from __future__ import annotations

from html import escape
from typing import Any

from blip3o_lit.report import charts, html, tradeoffs
from blip3o_lit.report.further import further
from blip3o_lit.report.images import images
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.retrieval import retrieval
from blip3o_lit.report.scores import (
    COLUMNS,
    FRECHET,
    SPREAD,
    Row,
    finite,
    headline,
    inline,
    mapping,
    rows,
    signed,
    significant,
    text,
)
from blip3o_lit.report.section import Section, source


def held_out(record: RunRecord) -> list[Section]:
    """Return the sections of an evaluation, or the one that says how to get it."""
    if not record.evaluation:
        return [not_evaluated(record)]
    found = rows(record)
    made = (
        result(record, found),
        positions(record, found),
        sampling(record, found),
        retrieval(record),
        images(record),
        *further(record),
    )
    return [section for section in made if section is not None]


def lede(record: RunRecord) -> str:
    """Return the opening paragraph: the result in one sentence, and what it belongs to."""
    if not record.evaluation:
        return (
            '<p class="lede">Trained, not evaluated yet: there is no held-out number to '
            "believe.</p>"
        )
    found = rows(record)
    row = headline(found)
    standing = record.evaluation.get("standing")
    said = f"Verdict: <strong>{escape(str(standing))}</strong>. " if standing else ""
    if row is not None and row.number("cosine") is not None:
        pair = row.interval
        said += (
            f"{escape(row.label)} with {_evaluations(row)} reaches cosine "
            f"<strong>{escape(text('cosine', row))}</strong>"
        )
        said += f" (95 % {pair[0]:.4f} to {pair[1]:.4f})" if pair else ""
        said += _against(row, [other for other in found if other.kind == "baseline"])
    return (
        f'<p class="lede">{said}</p><p class="source">{escape(source(record))}. Every number on '
        "this page is held out unless it says otherwise.</p>"
    )


def result(record: RunRecord, found: list[Row]) -> Section:
    """Return the tiles, the ladder of cosines and the tables of scores."""
    row = headline(found)
    body = f'<div class="tiles">{"".join(_tiles(record, found, row))}</div>' if row else ""
    about = escape(source(record))
    specs: dict[str, dict[str, Any]] = {}
    if any(item.number("cosine") is not None for item in found):
        specs["ladder"] = charts.ladder(found)
        body += html.figure(
            "ladder",
            f"Cosine a token with its 95 % interval over images. A constant token already scores "
            f"well above zero, so read each number against the baselines. {about}.",
            "Estimators and baselines",
        )
    caption = f"Scores of every estimator and baseline: {about}. Select a heading to sort."
    body += html.score_table(found, COLUMNS, caption, "scores")
    spread = f"How the cosine spreads over images: {about}. Select a heading to sort."
    body += html.details(
        "Spread over images, and every other score",
        html.score_table(found, SPREAD, spread, "spread") + _every_score(found, about),
    )
    return Section("result", "Result", body, charts=specs)


def positions(record: RunRecord, found: list[Row]) -> Section | None:
    """Return the map of cosines over the grid, CLS apart, and the map of their spread."""
    grid = _grid(record.evaluation.get("position_cosine"))
    if grid is None:
        return None
    row = headline(found)
    about = escape(source(record, row))
    specs = {
        "positions": charts.position_map(
            grid, "cosine", cls=row.number("cosine_cls") if row else None
        )
    }
    lines = [[index, *(f"{value:.3f}" for value in line)] for index, line in enumerate(grid)]
    table = html.plain_table(
        ["row", *map(str, range(len(grid[0])))], lines, f"Cosine by grid position: {about}.", "map"
    )
    body = html.figure(
        "positions",
        "Mean cosine at each grid position, colours fixed from 0 to 1 so that runs compare. "
        f"{about}.",
        "Cosine by position",
        html.details("The numbers of this map", f'<div class="values">{table}</div>'),
        wide=False,
    )
    deviation = _grid(record.evaluation.get("position_std"))
    if deviation is not None:
        specs["deviation"] = charts.position_map(
            deviation, "standard deviation over images", fixed=False
        )
        body += html.figure(
            "deviation",
            f"Standard deviation of the cosine over images at each position. {about}.",
            "Spread by position",
            wide=False,
        )
    return Section(
        "positions",
        "Where it works",
        f'<div class="maps">{body}</div>',
        "Row 0 is the top of the image, column 0 its left edge.",
        specs,
    )


def sampling(record: RunRecord, found: list[Row]) -> Section | None:
    """Return cosine and Frechet distance against NFE, and fidelity against realism."""
    curve = [point for point in record.evaluation.get("nfe_curve") or [] if isinstance(point, dict)]
    specs: dict[str, dict[str, Any]] = {}
    body = ""
    for score, title in (
        ("cosine", "Cosine"),
        ("frechet", FRECHET),
    ):
        spec = tradeoffs.against_nfe(curve, found, score, title)
        if spec is not None:
            specs[f"nfe-{score}"] = spec
            apart = [row for row in found if not tradeoffs.comparable(curve, row, score)]
            body += html.figure(
                f"nfe-{score}",
                _about_curve(record, curve, bool(apart)),
                f"{title} against network evaluations",
                _curve_table(curve, score),
            )
    spec = tradeoffs.plane(found)
    if spec is not None:
        specs["plane"] = spec
        body += html.figure(
            "plane",
            "A mean is close to its target but smoother than real tokens; a sample is more real "
            f"and further away. The top left corner has both. {escape(source(record))}.",
            "Fidelity against realism",
        )
    if not specs:
        return None
    return Section(
        "sampling",
        "What sampling costs and buys",
        f'<div class="grid">{body}</div>',
        "One evaluation at t = 0 estimates the posterior mean; an ODE solve draws a sample.",
        specs,
    )


def not_evaluated(record: RunRecord) -> Section:
    """Return the section that says how to get held-out numbers."""
    body = html.command(record.evaluate_command, "Evaluate the best checkpoint", "evaluate-command")
    note = (
        '<p class="note">There is no <code>evaluation.json</code> in this run directory. The '
        "command below scores the checkpoint on the held-out split beside its baselines and writes "
        "this page again.</p>"
    )
    return Section("result", "Result", note + body)


def _tiles(record: RunRecord, found: list[Row], row: Row) -> list[str]:
    """Return the summary tiles: each number with the baselines' beside it."""
    about = source(record, row)
    baselines = [item for item in found if item.kind == "baseline"]
    standing = record.evaluation.get("standing")
    tiles: list[str] = []
    if standing:
        gaps = [
            (item.label, signed(mine - theirs))
            for item in baselines
            if (mine := row.number("cosine")) is not None
            and (theirs := item.number("cosine")) is not None
        ]
        tiles.append(
            html.tile("Verdict", str(standing), gaps, f"Cosine above each baseline. {about}")
        )
    for name, title in (
        ("cosine", "Cosine, held out"),
        ("cosine_cls", "Cosine of CLS"),
        ("r2", "Variance explained"),
        ("frechet", FRECHET),
    ):
        if row.number(name) is None:
            continue
        beside = [
            (item.label, text(name, item)) for item in baselines if item.number(name) is not None
        ]
        if name == "frechet":
            beside = [
                (item.label, text(name, item))
                for item in found
                if item.kind == "estimator" and item is not row and item.number(name) is not None
            ][:1] + beside
            floor = finite(mapping(record.evaluation.get("frechet_floor")).get("frechet"))
            beside += [] if floor is None else [("Two halves of the truth", significant(floor))]
        tiles.append(html.tile(title, text(name, row), beside, about))
    return tiles


def _every_score(found: list[Row], about: str) -> str:
    """Return a table of every scalar score of every row, by its name in `evaluation.json`."""
    names = dict.fromkeys(
        name for row in found for name, value in row.scores.items() if finite(value) is not None
    )
    lines = [[name, *(row.number(name) for row in found)] for name in names]
    heads = ["score", *(row.key for row in found)]
    return html.plain_table(
        heads, lines, f"Every score, by its name in the file: {about}.", "every"
    )


def _about_curve(record: RunRecord, curve: list[dict[str, Any]], apart: bool) -> str:
    counts = {n for point in curve if (n := finite(point.get("images"))) is not None}
    images = counts.pop() if len(counts) == 1 else None
    if apart:
        return (
            f"Solvers on {escape(source(record, images=images))}. The distance depends on the "
            "number of images, so the rows of the tables, which have others, are not drawn here."
        )
    own = f"{images:,.0f} images" if images else "the curve's own images"
    return f"Solvers on {own}; rules, and what the curve lacks, on {escape(source(record))}."


def _curve_table(curve: list[dict[str, Any]], score: str) -> str:
    lines = [
        [point.get("solver"), point.get("nfe"), point.get(score), point.get("seconds_per_image")]
        for point in curve
    ]
    heads = ["solver", "NFE", score, "seconds an image"]
    table = html.plain_table(heads, lines, "The points of this curve.", f"curve-{score}")
    return html.details("The numbers of this curve", table)


def _grid(value: object) -> list[list[float]] | None:
    """Return a map of finite numbers, or None for anything else."""
    if not isinstance(value, list) or not all(isinstance(line, list) for line in value):
        return None
    if len({len(line) for line in value}) != 1:
        return None
    numbers = [[finite(item) for item in line] for line in value]
    whole = [[item for item in line if item is not None] for line in numbers]
    return whole if whole[0] and whole == numbers else None


def _against(row: Row, baselines: list[Row]) -> str:
    """Return the end of the opening sentence: every baseline's cosine."""
    scored = [item for item in baselines if item.number("cosine") is not None]
    if not scored:
        return ", with no baseline beside it, so the number says little."
    listed = _listed([f"{inline(item.label)} {text('cosine', item)}" for item in scored])
    return escape(f", against {listed}.")


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _evaluations(row: Row) -> str:
    nfe = row.number("nfe")
    if nfe is None:
        return "an unnamed number of network evaluations"
    return "one network evaluation" if nfe == 1 else f"{nfe:.4g} network evaluations"
