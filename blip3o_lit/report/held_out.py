"""The sections about held-out numbers: result, position map, sampling."""

from __future__ import annotations

from typing import Any

from blip3o_lit.report import charts, tradeoffs
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import (
    FRECHET,
    MISSING,
    Row,
    finite,
    headline,
    inline,
    mapping,
    mappings,
    rows,
    significant,
    source,
)
from blip3o_lit.report.section import Section
from blip3o_lit.report.tables import table


def opening(record: RunRecord) -> dict[str, Any]:
    """Return what the page says before its first section, and once for all of its numbers."""
    scored = _with("cosine", rows(record))
    against = [row for row in scored if row.kind == "baseline"]
    return {
        "evaluated": bool(record.evaluation),
        "standing": record.evaluation.get("standing"),
        "row": headline(scored),
        "against": [f"{inline(row.label)} {row.text('cosine')}" for row in against],
        "source": source(record),
    }


def result(record: RunRecord) -> Section:
    """Return the tiles, the ladder of cosines and the tables of scores."""
    if not record.evaluation:
        return Section("not_evaluated", "Result", {"command": record.evaluate_command})
    scored = rows(record)
    row, baselines = headline(scored), [item for item in scored if item.kind == "baseline"]
    others = [item for item in scored if item.kind == "estimator" and item is not row]
    tiles = {name: _with(name, baselines) for name in ("cosine", "cosine_cls", "r2", "frechet")}
    tiles["frechet"] = _with("frechet", others)[:1] + tiles["frechet"]
    cosine = row.number("cosine") if row else None
    floor = finite(mapping(record.evaluation.get("frechet_floor")).get("frechet"))
    names = dict.fromkeys(name for item in scored for name in item.scores)
    lines = ([name, *(item.number(name) for item in scored)] for name in names)
    data = {
        "row": row,
        "rows": scored,
        "present": {name for name in names if any(item.text(name) != MISSING for item in scored)},
        "every": table(["score", *(item.key for item in scored)], lines),
        "standing": record.evaluation.get("standing"),
        "cosine": cosine,
        "beside": tiles,
        "floor": None if floor is None else significant(floor),
    }
    drawn = {"ladder": charts.ladder(scored)} if _with("cosine", scored) else {}
    return Section("result", "Result", data, drawn)


def positions(record: RunRecord) -> Section | None:
    """Return the map of cosines over the grid, CLS apart, and the map of their spread."""
    grid = _grid(record.evaluation.get("position_cosine"))
    if grid is None:
        return None
    row = headline(rows(record))
    cls = row.number("cosine_cls") if row else None
    drawn = {"positions": charts.position_map(grid, "cosine", cls)}
    spread = _grid(record.evaluation.get("position_std"))
    if spread is not None:
        title = "standard deviation over images"
        drawn["deviation"] = charts.position_map(spread, title, fixed=False)
    lines = [[index, *(f"{value:.3f}" for value in line)] for index, line in enumerate(grid)]
    numbers = table(["row", *map(str, range(len(grid[0])))], lines)
    return Section("positions", "Where it works", {"numbers": numbers}, drawn)


def sampling(record: RunRecord) -> Section | None:
    """Return cosine and Frechet distance against NFE, and fidelity against realism."""
    curve, scored = mappings(record.evaluation.get("nfe_curve")), rows(record)
    drawn, figures = {}, []
    for score, title in (("cosine", "Cosine"), ("frechet", FRECHET)):
        spec = tradeoffs.against_nfe(curve, scored, score, title)
        if spec is not None:
            name = f"nfe-{score}"
            drawn[name] = spec
            heads = ["solver", "NFE", score, "seconds per image"]
            keys = ("solver", "nfe", score, "seconds_per_image")
            numbers = table(heads, ([point.get(key) for key in keys] for point in curve))
            apart = not all(tradeoffs.comparable(curve, row, score) for row in scored)
            figures.append((name, title, numbers, apart))
    spec = tradeoffs.plane(scored)
    if spec is not None:
        drawn["plane"] = spec
    if not drawn:
        return None
    counts = {finite(point.get("images")) for point in curve}
    images = counts.pop() if len(counts) == 1 else None
    data = {"figures": figures, "images": images, "plane": spec is not None}
    return Section("sampling", "What sampling costs and buys", data, drawn)


def _with(score: str, scored: list[Row]) -> list[Row]:
    return [row for row in scored if row.number(score) is not None]


def _grid(value: object) -> list[list[float]] | None:
    """Return a map of finite numbers, or None for anything else."""
    lines = value if isinstance(value, list) else []
    grid = [[finite(item) for item in line] for line in lines if isinstance(line, list)]
    whole = [[item for item in line if item is not None] for line in grid]
    same = len(grid) == len(lines) and whole == grid and len({len(line) for line in grid}) == 1
    return whole if same and whole[0] else None
