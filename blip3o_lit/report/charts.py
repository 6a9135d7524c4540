"""The charts as Vega-Lite specifications, made with Altair; colours come from the theme alone.

Ranges, ticks, labels and their overlap are Altair's own.
"""

from typing import Any

import altair as alt

from blip3o_lit.report.record import Curve, finite
from blip3o_lit.report.scores import KINDS, Row

HEIGHT = 240
"""Height of a wide chart in pixels."""
PLACE = "(isFinite(containerSize()[0]) ? containerSize()[0] : width + 60)"
"""Vega's words for the width of a chart's place on the page; in a picture, where it has none, about
the plot's. On a page a legend that followed the plot's width would change what it follows."""
LABELS = alt.ExprRef(
    "isFinite(containerSize()[0]) ? max(170, min(240, 0.4 * containerSize()[0])) : 240"
)
"""Pixels of a row's name at most: fewer on a phone."""
SHAPES = ["circle", "diamond", "square"]
"""Of `KINDS`, in their order."""

Spec = dict[str, Any]
Points = list[dict[str, Any]]


def base(values: Points) -> alt.Chart:
    return alt.Chart(alt.Data(values=values))


def specification(chart: Any, description: str, height: int | None = None) -> Spec:
    """Return a chart as a dict with its text for screen readers, without the schema's address.

    With a height in pixels it fills its place from left to right.
    """
    if height is not None:
        fit = alt.AutoSizeParams(type="fit-x", contains="padding")
        chart = chart.properties(width="container", height=height, autosize=fit)
    spec = chart.to_dict()
    own = {key: value for key, value in spec.items() if key not in ("$schema", "config")}
    return {**own, "description": description}


def axis(
    channel: Any, levels: list[float], title: str, decay: bool = True, padding: int = 0
) -> Any:
    """Return an `alt.X` or `alt.Y` with an axis for the numbers `levels`.

    It is logarithmic where they span a decade, unless `decay` is False.
    """
    if decay and min(levels) > 0 and max(levels) / min(levels) >= 10:
        scale = alt.Scale(nice=False, padding=padding, type="log")
        ticks = alt.Axis(tickCount=5, format="~g", grid=False)
        return channel.scale(scale).axis(ticks).title(f"{title} (log)")
    scale = alt.Scale(nice=not padding, padding=padding, zero=False)
    words = "format(datum.value, abs(datum.value) < 10000 ? '~g' : '.4~s')"
    ticks = alt.Axis(tickCount=5, labelOverlap=True, labelExpr=words)
    return channel.scale(scale).axis(ticks).title(title)


def ladder(rows: list[Row]) -> Spec:
    """Draw every row's cosine with its 95 % interval, the best on top."""
    values: Points = []
    for row in rows:
        cosine = row.number("cosine")
        if cosine is not None:
            low, high = row.interval or (cosine, cosine)
            numbers = {"cosine": cosine, "low": low, "high": high, "text": f"{cosine:.4f}"}
            values.append({"name": row.label, "kind": row.kind, **numbers})
    values.sort(key=lambda item: -item["cosine"])
    kinds = {item["kind"] for item in values}
    legend = alt.Legend(values=[kind for kind in KINDS if kind in kinds])
    colour = alt.Color("kind:N").scale(domain=KINDS).legend(legend)
    shape = alt.Shape("kind:N").scale(domain=KINDS, range=SHAPES).legend(legend)
    low = axis(alt.X("low:Q"), [item["low"] for item in values], "cosine, held out", False, 12)
    line = base(values).encode(
        alt.Y("name:N", sort=None, title=None).axis(grid=False, labelLimit=LABELS, labelFontSize=12)
    )
    chart = alt.layer(
        line.mark_rule(strokeWidth=3, strokeOpacity=0.45).encode(low, colour, x2="high:Q"),
        line.mark_point(size=90, opacity=1).encode(colour, shape, x="cosine:Q"),
        line.mark_text(align="left", dx=8).encode(x=alt.value("width"), text="text:N"),
    )
    text = "Cosine of each estimator and baseline with its interval, the best on top."
    return specification(chart, text, 28 * len(values))


def position_map(
    grid: list[list[float]],
    title: str,
    cls: float | None = None,
    shared: bool = True,
    size: int = 288,
) -> Spec:
    """Draw one value per grid position, top row first, and the value of CLS apart above it.

    All maps that are `shared` have one colour range, 0 to 1, which a reader may stretch to the
    map's own. `size` is in pixels, of the longer side.
    """
    values = [
        {"row": row, "column": column, "value": value}
        for row, line in enumerate(grid)
        for column, value in enumerate(line)
    ]
    levels = [item["value"] for item in values]
    if cls is not None and not shared:
        levels.append(cls)
    low, high = min(levels), max(levels)
    ends: list[Any] = [low, high]
    if shared:
        ends = [alt.ExprRef(f"stretch ? {low} : 0"), alt.ExprRef(f"stretch ? {high} : 1")]
    scale = alt.Scale(scheme="viridis", clamp=True, domainMin=ends[0], domainMax=ends[1])
    colour = alt.Color("value:Q", title=title, scale=scale).legend(
        orient="bottom", gradientLength=size * 5 / 6, gradientThickness=10, format=".4~g"
    )
    step = size / max(len(grid), len(grid[0]))
    ticks = alt.Axis(title=None, grid=False, labelAngle=0, labelOverlap=True)
    x, y = alt.X("column:O", axis=ticks), alt.Y("row:O", axis=ticks)
    chart: Any = base(values).mark_rect().encode(x, y, colour)
    chart = chart.properties(width=alt.Step(step), height=alt.Step(step))
    text = f"Map of {len(grid)} rows: {title}, lowest {low:.4f}, highest {high:.4f}"
    if cls is not None:
        above = alt.Y("name:N", title=None).axis(grid=False)
        single = base([{"name": "CLS", "value": cls}]).mark_rect().encode(above, colour)
        chart = alt.vconcat(single.properties(width=step, height=step), chart, spacing=10)
        text += f", CLS {cls:.4f}"
    if shared:
        box = alt.binding_checkbox(name="Stretch colours to this map's own range ")
        chart = chart.add_params(alt.param(name="stretch", value=False, bind=box))
    return specification(chart, f"{text}.")


def curves(series: dict[str, Curve], title: str, height: int = 200, decay: bool = False) -> Spec:
    """Draw training curves by step; with `decay`, on a logarithmic axis where that helps."""
    values = [
        {"series": name, "step": step, "value": value}
        for name, points in series.items()
        for step, value in points
    ]
    y = axis(alt.Y("value:Q"), [item["value"] for item in values], title, decay)
    x = alt.X("step:Q", title="step").axis(grid=False, tickCount=6)
    legend = alt.Legend(columns=3) if len(series) > 1 else None
    colour = alt.Color("series:N", sort=None, legend=legend)
    few = max(map(len, series.values())) <= 40
    line = base(values).mark_line(point={"size": 36} if few else False, strokeWidth=1.75)
    text = f"{title} over {max(item['step'] for item in values):,.0f} steps: {', '.join(series)}."
    return specification(line.encode(x, y, colour), text, height)


def bars(points: list[list[float]]) -> Spec:
    """Draw a loss over intervals of t: `points` are (from, to, loss)."""
    values = [{"low": low, "high": high, "loss": loss} for low, high, loss in points]
    x = alt.X("low:Q", title="t (0 is noise)").bin("binned").scale(nice=False).axis(tickCount=10)
    chart = base(values).mark_bar(binSpacing=1).encode(x, alt.Y("loss:Q"), x2="high:Q")
    return specification(chart, f"Loss by time t, in {len(points)} intervals.", 200)


def effect(setting: str, points: list[tuple[str, Any, float]]) -> Spec:
    """Draw the cosine of each run by a setting: `points` are (run, value, cosine).

    Numbers have an axis of their size; words stand evenly.
    """
    numbers = [finite(value) for _, value, _ in points]
    if None in numbers:
        x = alt.X("value:N", title=setting).axis(labelAngle=0)
        points = [(run, str(value), cosine) for run, value, cosine in points]
    else:
        x = axis(alt.X("value:Q"), numbers, setting, padding=12)  # type: ignore[arg-type]
    values = [{"run": run, "value": value, "cosine": cosine} for run, value, cosine in points]
    y = alt.Y("cosine:Q").scale(zero=False, padding=8)
    chart = base(values).mark_point(opacity=0.7).encode(x, y, detail="run:N")
    return specification(chart, f"Cosine of each run by {setting}.", 200)
