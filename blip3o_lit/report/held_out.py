"""The sections about held-out numbers: result, position map, sampling."""

from typing import Any

from blip3o_lit.report import charts, tradeoffs
from blip3o_lit.report.record import RunRecord, finite, mapping, mappings
from blip3o_lit.report.scores import (
    FRECHET,
    MISSING,
    headline,
    inline,
    rows,
    significant,
    source,
    with_score,
)
from blip3o_lit.report.tables import table
from blip3o_lit.report.templating import Section


def opening(record: RunRecord) -> dict[str, Any]:
    """Return what the page says before its first section, and once for all of its numbers."""
    scored = with_score("cosine", rows(record))
    against = [row for row in scored if row.kind == "baseline"]
    return {
        "evaluated": bool(record.evaluation),
        "standing": record.evaluation.get("standing"),
        "row": headline(scored),
        "against": [f"{inline(row.label)} {row.text('cosine')}" for row in against],
        "source": source(record),
    }


def result(record: RunRecord) -> Section:
    if not record.evaluation:
        return Section("not_evaluated", "Result", {"command": record.evaluate_command})
    scored = rows(record)
    row = headline(scored)
    others = [item for item in scored if item.kind == "estimator" and item is not row]
    halves = mapping(record.evaluation.get("frechet_floor"))
    floor = finite(halves.get("frechet"))
    names = dict.fromkeys(name for item in scored for name in item.scores)
    keys = [*(item.key for item in scored), *(["two true halves"] if halves else [])]
    lines = (
        [name, *(item.number(name) for item in scored), *([halves.get(name)] if halves else [])]
        for name in names
    )
    data = {
        "row": row,
        "rows": scored,
        "present": {name for name in names if any(item.text(name) != MISSING for item in scored)},
        "every": table(["score", *keys], lines),
        "standing": record.evaluation.get("standing"),
        "baselines": [item for item in scored if item.kind == "baseline"],
        "real": [item for item in with_score("frechet", others) if not item.apart][:1],
        "floor": None if floor is None else significant(floor),
    }
    drawn = {"ladder": charts.ladder(scored)} if with_score("cosine", scored) else {}
    return Section("result", "Result", data, drawn)


def positions(record: RunRecord) -> Section | None:
    grid = _grid(record.evaluation.get("position_cosine"))
    if grid is None:
        return None
    row = headline(rows(record))
    cls = row.number("cosine_cls") if row else None
    drawn = {"positions": charts.position_map(grid, "cosine", cls)}
    spread = _grid(record.evaluation.get("position_std"))
    if spread is not None:
        title = "standard deviation over images"
        drawn["deviation"] = charts.position_map(spread, title, shared=False)
    lines = [[index, *(f"{value:.3f}" for value in line)] for index, line in enumerate(grid)]
    numbers = table(["row", *map(str, range(len(grid[0])))], lines)
    return Section("positions", "Where it works", {"numbers": numbers}, drawn)


def sampling(record: RunRecord) -> Section | None:
    curve, scored = mappings(record.evaluation.get("nfe_curve")), rows(record)
    drawn, figures = {}, []
    for score, title in (("cosine", "Cosine"), ("frechet", FRECHET)):
        spec = tradeoffs.against_nfe(curve, scored, score, title)
        if spec is not None:
            drawn[f"nfe-{score}"] = spec
            keys = ("solver", "nfe", score, "seconds_per_image")
            lines = [[point.get(key) for key in keys] for point in curve]
            numbers = table(["solver", "NFE", score, "seconds per image"], lines)
            apart = not all(tradeoffs.comparable(curve, row, score) for row in scored)
            figures.append((f"nfe-{score}", title, numbers, apart))
    spec = tradeoffs.plane([row for row in scored if not row.apart])
    if spec is not None:
        drawn["plane"] = spec
    if not drawn:
        return None
    images = tradeoffs.curve_images(curve)
    data = {"figures": figures, "images": images, "apart": any(row.apart for row in scored)}
    return Section("sampling", "What sampling costs and buys", data, drawn)


def _grid(value: object) -> list[list[float]] | None:
    """Return a map of finite numbers, or None for anything else."""
    lines = value if isinstance(value, list) else []
    grid = [[finite(item) for item in line] for line in lines if isinstance(line, list)]
    whole = [[item for item in line if item is not None] for line in grid]
    same = len(grid) == len(lines) and whole == grid and len({len(line) for line in grid}) == 1
    return whole if same and whole[0] else None
