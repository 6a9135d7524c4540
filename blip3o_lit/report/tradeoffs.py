"""What sampling costs and buys: scores against network evaluations, fidelity against realism."""

from typing import Any

import altair as alt

from blip3o_lit.report.charts import HEIGHT, PLACE, SHAPES, Points, Spec, axis, base, specification
from blip3o_lit.report.record import finite
from blip3o_lit.report.scores import FRECHET, KINDS, Row, estimator, significant, with_score

COLUMNS = alt.ExprRef(f"max(1, floor(({PLACE} - 60) / 210))")
"""Of a legend with long labels: side by side on a desk, one below another on a phone."""
DASHES = [[4, 4], [1, 3], [10, 3], [8, 3, 2, 3]]


def against_nfe(points: Points, rows: list[Row], score: str, title: str) -> Spec | None:
    """Draw a score against the network evaluations of each solver, baselines as dashed rules.

    None when no point of the curve has this score.
    """
    curve = _curve(points, score)
    if not curve:
        return None
    beside = [row for row in with_score(score, rows) if comparable(points, row, score)]
    if estimator("mean") not in {item["solver"] for item in curve}:
        curve += [
            {"solver": row.label, "nfe": row.number("nfe") or 1, "value": row.number(score)}
            for row in beside
            if row.key == "mean" and row.kind == "estimator"
        ]
    levels = [item["value"] for item in curve]
    x = alt.X("nfe:Q", title="network evaluations per image (log)").axis(format="d", grid=False)
    x = x.scale(type="log", base=2, nice=False, padding=12)
    y = axis(alt.Y("value:Q"), levels, title, decay=False, padding=12)
    lines = base(curve).encode(x, y, alt.Color("solver:N", sort=None).legend(columns=3))
    layers: list[Any] = [lines.mark_line(), lines.mark_point(opacity=1)]
    baselines = [row for row in beside if row.kind == "baseline"]
    if baselines:
        layers.insert(0, _rules(baselines, score, levels, y))
    text = f"{title} of each solver against network evaluations, from {curve[0]['nfe']:g} on."
    return specification(alt.layer(*layers), text, HEIGHT)


def _curve(points: Points, score: str) -> Points:
    curve: Points = []
    for point in points:
        nfe, value = finite(point.get("nfe")), finite(point.get(score))
        if nfe is not None and value is not None and nfe > 0:
            solver = estimator(str(point.get("solver")))
            curve.append({"solver": solver, "nfe": nfe, "value": value})
    return curve


def _rules(baselines: list[Row], score: str, levels: list[float], y: Any) -> Any:
    """Return a rule per baseline, named with its value in the legend.

    The vertical range belongs to the curve. A baseline further from it than 1.5 of its spans would
    flatten it: it has no rule, but an arrow in the legend.
    """
    low, high = min(levels), max(levels)
    reach = 1.5 * max(high - low, 0.02 * abs(high), 1e-6)
    names, rules = [], []
    for row in baselines:
        value = row.number(score) or 0.0
        name = f"{row.label} {significant(value)}"
        if value < low - reach:
            names.append(f"↓ {name}")
        elif value > high + reach:
            names.append(f"↑ {name}")
        else:
            names.append(name)
            rules.append({"name": name, "value": value})
    legend = alt.Legend(orient="bottom", symbolType="stroke", symbolSize=300, columns=COLUMNS)
    dash = alt.StrokeDash("name:N").scale(domain=names, range=DASHES).legend(legend)
    return base(rules).mark_rule(strokeWidth=1.5).encode(y, dash)


def curve_images(points: Points) -> float | None:
    """Return how many images the points of a curve have, or None where they differ."""
    counts = {finite(point.get("images")) for point in points}
    return counts.pop() if len(counts) == 1 else None


def comparable(points: Points, row: Row, score: str) -> bool:
    """Return whether a row may stand beside the curve: Frechet distances need equal images.

    The distance of n images is biased by about 1/n, so those of 64 and 512 images differ.
    """
    images = row.scores.get("images")
    return score != "frechet" or all(point.get("images") == images for point in points)


def plane(rows: list[Row]) -> Spec | None:
    """Draw fidelity (cosine) against realism (Frechet distance); the best corner is top left.

    None when fewer than two rows have both scores.
    """
    values: Points = []
    shapes = []
    for row in rows:
        cosine, frechet = row.number("cosine"), row.number("frechet")
        if cosine is not None and frechet is not None:
            values.append({"name": row.label, "cosine": cosine, "frechet": frechet})
            shapes.append(SHAPES[KINDS.index(row.kind)])
    if len(values) < 2:
        return None
    distances = [item["frechet"] for item in values]
    x = axis(alt.X("frechet:Q"), distances, f"{FRECHET}, lower is more real", padding=16)
    cosines = [item["cosine"] for item in values]
    y = axis(alt.Y("cosine:Q"), cosines, "cosine, higher is closer", decay=False, padding=16)
    names, legend = [item["name"] for item in values], alt.Legend(columns=COLUMNS)
    colour = alt.Color("name:N").scale(domain=names).legend(legend)
    shape = alt.Shape("name:N").scale(domain=names, range=shapes).legend(legend)
    chart = base(values).mark_point(size=90, opacity=1).encode(x, y, colour, shape)
    return specification(chart, "Cosine against Frechet distance, a point per row.", HEIGHT)
