"""The charts as Vega-Lite specifications, made with Altair; colours come from the theme alone."""

from __future__ import annotations

import math
from typing import Any

import altair as alt

from blip3o_lit.report.scores import Row, significant

HEIGHT = 240
"""Height of a wide chart in pixels."""
KINDS = ["Estimator", "Baseline", "Optimum"]
SHAPES = ["circle", "diamond", "square"]

FIT = alt.AutoSizeParams(type="fit-x", contains="padding")

Spec = dict[str, Any]
Points = list[dict[str, Any]]


def specification(chart: Any, description: str) -> Spec:
    """Return a chart as a dict with its text for screen readers, without the schema's address."""
    spec = chart.to_dict()
    for key in ("$schema", "config"):
        spec.pop(key, None)
    spec["description"] = description
    return spec


def ladder(found: list[Row]) -> Spec:
    """Draw every row's cosine with its 95 % interval, the best on top."""
    values: Points = []
    for row in found:
        cosine = row.number("cosine")
        if cosine is None:
            continue
        low, high = row.interval or (cosine, cosine)
        values.append(
            {
                "name": row.label,
                "kind": row.kind.capitalize(),
                "cosine": cosine,
                "low": low,
                "high": high,
                "text": f"{cosine:.4f}",
            }
        )
    low, high = margins([item[key] for item in values for key in ("low", "high")], 0.04, 0.04)
    kinds = [kind for kind in KINDS if any(item["kind"] == kind for item in values)]
    scale = alt.Scale(domain=[low, high], nice=False)
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("name:N", sort=alt.SortField("cosine", "descending"))
        .title(None)
        .axis(grid=False, labelLimit=170, labelFontSize=12)
    )
    colour = alt.Color("kind:N", scale=alt.Scale(domain=KINDS))
    chart = alt.layer(
        base.mark_rule(strokeWidth=3, strokeOpacity=0.45).encode(
            x=alt.X(
                "low:Q",
                scale=scale,
                axis=alt.Axis(tickCount=5, labelOverlap=True, labelSeparation=8),
            ).title("cosine, held out"),
            x2="high:Q",
            color=colour,
        ),
        base.mark_point(size=90, opacity=1).encode(
            x=alt.X("cosine:Q", scale=scale),
            color=colour.legend(values=kinds, symbolOpacity=1),
            shape=alt.Shape("kind:N")
            .scale(domain=KINDS, range=SHAPES)
            .legend(values=kinds, symbolOpacity=1),
            tooltip=[
                alt.Tooltip("name:N", title="row"),
                alt.Tooltip("cosine:Q", format=".4f"),
                alt.Tooltip("low:Q", format=".4f", title="95 % from"),
                alt.Tooltip("high:Q", format=".4f", title="95 % to"),
            ],
        ),
        base.mark_text(align="left", dx=8).encode(x=alt.value("width"), text="text:N"),
    ).properties(width="container", height=28 * len(values), autosize=FIT)
    said = ", ".join(
        f"{item['name']} {item['text']}" for item in sorted(values, key=lambda v: -v["cosine"])
    )
    return specification(chart, f"Cosine of each estimator and baseline, best first: {said}.")


def position_map(
    grid: list[list[float]],
    title: str,
    cls: float | None = None,
    fixed: bool = True,
    control: bool = True,
    size: int = 288,
) -> Spec:
    """Draw one value a grid position, CLS apart above it.

    Args:
        grid: Rows of values, top row first.
        title: What the values are, in a few words.
        cls: The value of the CLS token, where there is one.
        fixed: One colour range, 0 to 1, for all runs; else the map's own range.
        control: Whether a reader may stretch a fixed range to the map's own.
        size: Pixels of the longer side.
    """
    flat = [value for line in grid for value in line]
    low, high = min(flat), max(flat)
    if cls is not None and not fixed:
        low, high = min(low, cls), max(high, cls)
    scale = alt.Scale(scheme="viridis", clamp=True, domain=[0, 1] if fixed else [low, high])
    control = control and fixed
    if control:
        scale = alt.Scale(
            scheme="viridis",
            clamp=True,
            domainMin=alt.ExprRef(f"stretch ? {low} : 0"),
            domainMax=alt.ExprRef(f"stretch ? {high} : 1"),
        )
    step = size / max(len(grid), *(len(line) for line in grid))
    colour = alt.Color("value:Q", scale=scale).legend(
        orient="bottom",
        gradientLength=size * 5 / 6,
        gradientThickness=10,
        title=title,
        format=".3~f",
    )
    values = [
        {"row": row, "column": column, "value": value}
        for row, line in enumerate(grid)
        for column, value in enumerate(line)
    ]
    axis = alt.Axis(title=None, grid=False, labelAngle=0, labelOverlap=True)
    patches = (
        alt.Chart(alt.Data(values=values))
        .mark_rect()
        .encode(
            x=alt.X("column:O", axis=axis),
            y=alt.Y("row:O", axis=axis),
            color=colour,
            tooltip=[
                alt.Tooltip("row:O"),
                alt.Tooltip("column:O"),
                alt.Tooltip("value:Q", format=".4f", title=title),
            ],
        )
        .properties(width={"step": step}, height={"step": step})
    )
    chart: Any = patches
    if cls is not None:
        single = (
            alt.Chart(alt.Data(values=[{"name": "CLS", "value": cls}]))
            .mark_rect()
            .encode(
                y=alt.Y("name:N", axis=alt.Axis(title=None, grid=False)),
                color=colour,
                tooltip=[alt.Tooltip("value:Q", format=".4f", title=f"CLS, {title}")],
            )
            .properties(width=step, height=step)
        )
        chart = alt.vconcat(single, patches, spacing=10)
    if control:
        chart = chart.add_params(
            alt.param(
                name="stretch",
                value=False,
                bind=alt.binding_checkbox(name="Stretch colours to this map's own range "),
            )
        )
    said = f"Map of {len(grid)} rows: {title}, lowest {low:.4f}, highest {high:.4f}"
    return specification(chart, said + (f", CLS {cls:.4f}." if cls is not None else "."))


def curves(
    series: dict[str, list[tuple[float, float]]],
    title: str,
    height: int = 200,
    decay: bool = False,
) -> Spec:
    """Draw training curves that share an axis.

    Args:
        series: Name -> [(step, value), ...]; none empty.
        title: Title of the vertical axis.
        height: Pixels.
        decay: Whether the axis may be logarithmic; it is where the values span a decade.
    """
    values = [
        {"series": name, "step": step, "value": value}
        for name, points in series.items()
        for step, value in points
    ]
    levels = [item["value"] for item in values]
    log = decay and min(levels) > 0 and max(levels) / min(levels) > 10
    y = alt.Y("value:Q").title(title + (" (log)" if log else ""))
    if log:
        y = y.scale(type="log", nice=False).axis(
            values=decades(min(levels), max(levels)), format="~g"
        )
    else:
        labels = "format(datum.value, abs(datum.value) < 10000 ? '~g' : '~s')"
        y = y.scale(zero=False).axis(tickCount=5, labelExpr=labels)
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("step:Q")
        .axis(grid=False, tickCount=6, labelExpr="format(datum.value, '~s')")
        .title("step"),
        y=y,
        color=alt.Color("series:N", sort=None).legend(
            None if len(series) == 1 else alt.Legend(columns=3)
        ),
        tooltip=[
            alt.Tooltip("series:N"),
            alt.Tooltip("step:Q", format=",d"),
            alt.Tooltip("value:Q", format=".4~g"),
        ],
    )
    sparse = max(len(points) for points in series.values()) <= 40
    chart = base.mark_line(point={"size": 36} if sparse else False, strokeWidth=1.75)
    chart = chart.properties(width="container", height=height, autosize=FIT)
    said = "; ".join(
        f"{name} from {significant(points[0][1])} to {significant(points[-1][1])}"
        for name, points in series.items()
    )
    last = max(item["step"] for item in values)
    return specification(chart, f"{title} over {last:,.0f} steps: {said}.")


def bars(points: list[tuple[float, float, float]]) -> Spec:
    """Draw a value over intervals of t: `points` are (from, to, value)."""
    values = [{"low": low, "high": high, "value": value} for low, high, value in points]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(binSpacing=1)
        .encode(
            x=alt.X("low:Q", scale=alt.Scale(nice=False)).bin("binned").title("t (0 is noise)"),
            x2="high:Q",
            y=alt.Y("value:Q").title("loss"),
            tooltip=[
                alt.Tooltip("low:Q", format=".2f", title="from t"),
                alt.Tooltip("high:Q", format=".2f", title="to t"),
                alt.Tooltip("value:Q", format=".4~g", title="loss"),
            ],
        )
        .properties(width="container", height=200, autosize=FIT)
    )
    said = "; ".join(f"{low:g} to {high:g}: {significant(value)}" for low, high, value in points)
    return specification(chart, f"Loss by time t: {said}.")


def margins(levels: list[float], below: float, above: float) -> tuple[float, float]:
    """Return an axis range with a margin, as shares of the span, on both sides."""
    low, high = min(levels), max(levels)
    span = (high - low) or abs(high) or 1.0
    return low - below * span, high + above * span


def decades(low: float, high: float) -> list[float]:
    """Return the ticks 1, 2, 5 of each decade between two positive numbers."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = (mantissa * 10.0**power for power in powers for mantissa in (1, 2, 5))
    return [tick for tick in ticks if low <= tick <= high]
