"""Parallel coordinates: an axis a setting, a line a run."""

from __future__ import annotations

import math
from typing import Any

import altair as alt

from blip3o_lit.report.charts import FIT, Points, Spec, decades, specification
from blip3o_lit.report.scores import finite

TICKS = 6
"""Labels an axis."""


def coordinates(axes: dict[str, list[Any]], names: list[str]) -> Spec:
    """Draw one line a run through the value it has on each axis, coloured by the last.

    Args:
        axes: Name -> a value a run. Numbers are placed by size, by their logarithm where they span
            a decade; words evenly, in alphabetical order.
        names: The runs.
    """
    points: Points = []
    labels: Points = []
    last = list(axes)[-1]
    for axis, values in axes.items():
        places, ticks = _scale(values)
        labels += [{"axis": axis, "place": place, "text": text} for text, place in ticks]
        for name, value, place, colour in zip(names, values, places, axes[last], strict=True):
            point = {"axis": axis, "run": name, "place": place, "score": colour}
            points.append({**point, "value": f"{value:g}" if finite(value) else str(value)})
    order = list(axes)
    x = alt.X("axis:N", sort=order).axis(labelAngle=0, orient="top", labelFontSize=12).title(None)
    y = alt.Y("place:Q").scale(domain=[-0.05, 1.05], nice=False).axis(None)
    runs = alt.Chart(alt.Data(values=points)).encode(
        x=x,
        y=y,
        detail="run:N",
        color=alt.Color("score:Q").scale(scheme="viridis").legend(title=last, gradientLength=160),
    )
    tips = [
        alt.Tooltip("run:N"),
        alt.Tooltip("axis:N", title="setting"),
        alt.Tooltip("value:N"),
        alt.Tooltip("score:Q", title=last, format=".4f"),
    ]
    ticks = alt.Chart(alt.Data(values=labels)).encode(x=x, y=y, text="text:N")
    chart = alt.layer(
        runs.mark_line(strokeWidth=2, opacity=0.75),
        runs.mark_point(size=50, opacity=1).encode(tooltip=tips),
        ticks.mark_text(align="left", dx=9, style="halo"),
        ticks.mark_text(align="left", dx=9),
    ).properties(width="container", height=280, autosize=FIT)
    said = (
        f"{len(names)} runs over {', '.join(order[:-1])}; {last} is the colour and the last axis."
    )
    return specification(chart, f"Parallel coordinates of {said}")


def _scale(values: list[Any]) -> tuple[list[float], list[tuple[str, float]]]:
    """Return the place of each value between 0 and 1, and the axis labels with theirs."""
    numbers = [finite(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) < len(values):
        words = sorted({str(value) for value in values})
        place = {word: index / max(1, len(words) - 1) for index, word in enumerate(words)}
        return [place[str(value)] for value in values], list(place.items())
    low, high = min(known), max(known)
    log = low > 0 and high / low >= 10
    span = (high - low) or 1.0

    def position(number: float) -> float:
        return math.log(number / low, high / low) if log else (number - low) / span

    ticks = sorted(set(known))
    if len(ticks) > TICKS:
        inner = decades(low, high) if log else [low + span * i / (TICKS - 1) for i in range(TICKS)]
        ticks = [low, *inner[:: max(1, len(inner) // TICKS)], high]
    return [position(n) for n in known], [(f"{t:.4g}", position(t)) for t in ticks]
