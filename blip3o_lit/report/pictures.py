"""The main picture of a run as a PNG: where it works, what sampling costs, who it beats."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import vl_convert
from PIL import Image

from blip3o_lit.config.errors import UserError
from blip3o_lit.report import charts, tradeoffs
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import headline, rows
from blip3o_lit.report.section import source
from blip3o_lit.report.theme import LIGHT

WIDTH = 380


def draw_picture(run_dir: Path, target: Path, scale: float = 1.5) -> Path:
    """Draw cosine map, cosine against NFE, and the ladder of baselines side by side.

    Args:
        run_dir: An evaluated run directory.
        target: The PNG to write.
        scale: Pixels a unit; 1.5 is sharp where a page shows it at 700 to 1200 pixels.

    Returns:
        `target`.

    Raises:
        UserError: If the run was never evaluated.
    """
    record = RunRecord.load(Path(run_dir))
    if not record.evaluation:
        raise UserError(f"{run_dir} has no evaluation.json to draw: {record.evaluate_command}")
    target.parent.mkdir(parents=True, exist_ok=True)
    drawn = vl_convert.vegalite_to_png(
        picture(record), scale=scale, config={**LIGHT, "padding": 16}
    )
    # Without the alpha channel and compressed again it is a quarter of the size.
    Image.open(io.BytesIO(drawn)).convert("RGB").save(target, "PNG", optimize=True)
    return target


def png(spec: dict[str, Any], title: str = "", width: int = WIDTH, scale: float = 2.0) -> bytes:
    """Return one chart of the report as a PNG, for a notebook or a slide.

    Args:
        spec: A chart from `charts` or `tradeoffs`.
        title: Stands above it.
        width: Width in pixels of a chart that fills its place on the page.
        scale: Pixels a unit.
    """
    drawn = _titled(spec, title, width)
    return vl_convert.vegalite_to_png(drawn, scale=scale, config={**LIGHT, "padding": 16})


def picture(record: RunRecord) -> dict[str, Any]:
    """Return the picture as one Vega-Lite specification."""
    found = rows(record)
    row = headline(found)
    evaluation = record.evaluation
    parts: list[dict[str, Any]] = []
    if "position_cosine" in evaluation:
        cls = row.number("cosine_cls") if row else None
        # One run alone: its own range shows more than the range that all runs share.
        grid, name = evaluation["position_cosine"], "cosine, colours over its own range"
        drawn = charts.position_map(grid, name, cls, fixed=False, size=440)
        parts.append(_titled(drawn, "Cosine by position"))
    right = [_titled(charts.ladder(found), "Held-out cosine, with baselines")]
    spec = tradeoffs.against_nfe(evaluation.get("nfe_curve") or [], found, "cosine", "cosine")
    if spec is not None:
        right.append(_titled(spec, "Cosine against network evaluations"))
    parts.append({"vconcat": right, "spacing": 28, "resolve": _APART})
    return {
        "title": {
            "text": source(record),
            "anchor": "middle",
            "orient": "bottom",
            "offset": 14,
            "fontSize": 11,
            "fontWeight": "normal",
            "color": LIGHT["axis"]["labelColor"],
        },
        "hconcat": parts,
        "spacing": 48,
        "resolve": _APART,
    }


_APART = {"scale": {"color": "independent", "shape": "independent"}}


def _titled(spec: dict[str, Any], title: str, width: int = WIDTH) -> dict[str, Any]:
    """Return a chart with a title and a width of its own."""
    kept = {key: value for key, value in spec.items() if key != "description"}
    if kept.get("width") == "container":
        kept["width"] = width
    return {**kept, "title": title} if title else kept
