"""The main picture of a run as a PNG: where it works, what sampling costs, who it beats."""

import io
from pathlib import Path

import vl_convert
from PIL import Image

from blip3o_lit.config.errors import UserError
from blip3o_lit.report import charts, tradeoffs
from blip3o_lit.report.charts import Spec
from blip3o_lit.report.record import RunRecord, mappings
from blip3o_lit.report.scores import headline, rows, source
from blip3o_lit.report.templating import theme

WIDTH = 380
APART = {"scale": dict.fromkeys(("color", "shape", "strokeDash"), "independent")}
"""Charts beside one another have legends of their own."""


def draw_picture(run_dir: Path, target: Path) -> Path:
    record = RunRecord.load(Path(run_dir))
    if not record.evaluation:
        raise UserError(f"{run_dir} has no evaluation.json to draw: {record.evaluate_command}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without the alpha channel and compressed again it is a quarter of the size.
    drawn = Image.open(io.BytesIO(png(picture(record), scale=1.5)))
    drawn.convert("RGB").save(target, "PNG", optimize=True)
    return target


def png(spec: Spec, title: str = "", width: int = WIDTH, scale: float = 2.0) -> bytes:
    """Return a chart from `charts` or `tradeoffs` as a PNG, for a notebook or a slide.

    `width` is in pixels, of a chart that fills its place on the page; `scale` in pixels per unit.
    """
    config = {**theme(), "padding": 16}
    return vl_convert.vegalite_to_png(_titled(spec, title, width), scale=scale, config=config)


def picture(record: RunRecord) -> Spec:
    scored, evaluation = rows(record), record.evaluation
    row = headline(scored)
    parts: list[Spec] = []
    if "position_cosine" in evaluation:
        cls = row.number("cosine_cls") if row else None
        # One run alone: its own range shows more than the range that all runs share.
        grid, name = evaluation["position_cosine"], "cosine, colours over its own range"
        drawn = charts.position_map(grid, name, cls, shared=False, size=440)
        parts.append(_titled(drawn, "Cosine by position"))
    right = [_titled(charts.ladder(scored), "Held-out cosine, with baselines")]
    points = mappings(evaluation.get("nfe_curve"))
    curve = tradeoffs.against_nfe(points, scored, "cosine", "cosine")
    images = tradeoffs.curve_images(points)
    if curve is not None:
        of = f", solvers on {images:,.0f} images" if images else ""
        right.append(_titled(curve, f"Cosine against network evaluations{of}"))
    parts.append({"vconcat": right, "spacing": 28, "resolve": APART})
    title = {
        "text": source(record),
        "anchor": "middle",
        "orient": "bottom",
        "offset": 14,
        "fontSize": 11,
        "fontWeight": "normal",
        "color": theme()["axis"]["labelColor"],
    }
    return {"title": title, "hconcat": parts, "spacing": 48, "resolve": APART}


def _titled(spec: Spec, title: str, width: int = WIDTH) -> Spec:
    own = {"title": title} if title else {}
    own |= {"width": width} if spec.get("width") == "container" else {}
    return {**spec, **own}
