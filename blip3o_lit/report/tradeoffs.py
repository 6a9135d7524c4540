"""What sampling costs and buys: scores against network evaluations, fidelity against realism."""

from __future__ import annotations

import math
from typing import Any

import altair as alt

from blip3o_lit.report.charts import (
    FIT,
    HEIGHT,
    KINDS,
    SHAPES,
    Points,
    Spec,
    decades,
    margins,
    specification,
)
from blip3o_lit.report.scores import FRECHET, Row, estimator, finite, significant

LABEL_GAP = 13
"""Pixels between two labels at the right edge."""
LETTER = 0.01
"""Share of the plane's width that a letter of a label takes, its gap to the point included."""


def against_nfe(points: Points, found: list[Row], score: str, title: str) -> Spec | None:
    """Draw a score against the network evaluations of each solver, baselines as dashed rules.

    A score that depends on the number of images (`comparable`) stands beside the rows of the
    tables only where the curve has as many.

    Returns:
        None when no point of the curve has this score.
    """
    curve: Points = []
    for point in points:
        nfe, value = finite(point.get("nfe")), finite(point.get(score))
        if nfe is not None and value is not None and nfe > 0:
            solver = estimator(str(point.get("solver")))
            curve.append({"solver": solver, "nfe": nfe, "value": value})
    if not curve:
        return None
    found = [row for row in found if comparable(points, row, score)]
    if not any(item["solver"] == estimator("mean") for item in curve):
        curve += [
            {"solver": row.label, "nfe": row.number("nfe") or 1, "value": row.number(score)}
            for row in found
            if row.key == "mean" and row.kind == "estimator" and row.number(score) is not None
        ]
    low, high, rules = _references(curve, found, score)
    ticks = sorted({2 ** round(math.log2(item["nfe"])) for item in curve})
    x = (
        alt.X("nfe:Q")
        .scale(type="log", base=2, domain=[ticks[0] / 1.15, max(i["nfe"] for i in curve) * 1.15])
        .axis(values=ticks, format="d", grid=False)
        .title("network evaluations an image (log)")
    )
    y = alt.Y("value:Q").scale(domain=[low, high], nice=False).title(title)
    colour = alt.Color("solver:N", sort=None).legend(columns=3)
    lines = alt.Chart(alt.Data(values=curve)).encode(x=x, y=y, color=colour)
    tips = [
        alt.Tooltip("solver:N"),
        alt.Tooltip("nfe:Q", title="NFE"),
        alt.Tooltip("value:Q", title=title, format=".4~g"),
    ]
    layers: list[Any] = [
        lines.mark_line(),
        lines.mark_point(size=60, opacity=1).encode(tooltip=tips),
    ]
    if rules:
        reference = alt.Chart(alt.Data(values=rules))
        layers = [
            reference.mark_rule(strokeDash=[4, 4])
            .transform_filter("datum.shown")
            .encode(
                y=y,
                tooltip=[
                    alt.Tooltip("name:N", title="baseline"),
                    alt.Tooltip("value:Q", title=title, format=".4~g"),
                ],
            ),
            reference.mark_text(align="left", dx=8).encode(
                x=alt.value("width"), y=alt.Y("place:Q"), text="text:N"
            ),
            *layers,
        ]
    chart = alt.layer(*layers).properties(width="container", height=HEIGHT, autosize=FIT)
    said = "; ".join(
        f"{item['solver']} at {item['nfe']:g}: {significant(item['value'])}" for item in curve
    )
    return specification(chart, f"{title} against network evaluations. {said}.")


def comparable(points: Points, row: Row, score: str) -> bool:
    """Return whether a row may stand beside the curve: Frechet distances need equal images.

    The distance of n images is biased by about 1/n: 64 and 512 images of one model differ by half.
    """
    if score != "frechet":
        return True
    return all(point.get("images") == row.scores.get("images") for point in points)


def plane(found: list[Row]) -> Spec | None:
    """Draw fidelity (cosine) against realism (Frechet distance); the best corner is top left.

    Returns:
        None when fewer than two rows have both scores.
    """
    values: Points = [
        {
            "name": row.label,
            "kind": row.kind.capitalize(),
            "cosine": row.number("cosine"),
            "frechet": row.number("frechet"),
        }
        for row in found
        if row.number("cosine") is not None and row.number("frechet") is not None
    ]
    if len(values) < 2:
        return None
    low, high = margins([item["cosine"] for item in values], 0.08, 0.08)
    places = _spread([item["cosine"] for item in values], low, high)
    for item, place in zip(values, places, strict=True):
        item["place"] = place
    near, far = min(item["frechet"] for item in values), max(item["frechet"] for item in values)
    log = near > 0 and far / near > 10
    across = (near / 1.6, far * 1.6) if log else margins([near, far], 0.15, 0.25)
    left, right = _choose_sides(values, across, (low, high), log)
    scale = alt.Scale(type="log" if log else "linear", domain=[left, right], nice=False)
    x = alt.X("frechet:Q", scale=scale).title(
        f"{FRECHET} (lower is more real{', log' if log else ''})"
    )
    x = x.axis(values=decades(left, right), format="~g") if log else x
    base = alt.Chart(alt.Data(values=values)).encode(x=x)
    y = alt.Y("cosine:Q").scale(domain=[low, high], nice=False).title("cosine (higher is closer)")
    chart = alt.layer(
        base.mark_point(size=90, opacity=1).encode(
            y=y,
            color=alt.Color("kind:N").scale(domain=KINDS).legend(None),
            shape=alt.Shape("kind:N").scale(domain=KINDS, range=SHAPES).legend(None),
            tooltip=[
                alt.Tooltip("name:N", title="row"),
                alt.Tooltip("cosine:Q", format=".4f"),
                alt.Tooltip("frechet:Q", format=".4~g"),
            ],
        ),
        base.mark_text(align="left", dx=10)
        .transform_filter("(width < 420 ? datum.narrow : datum.side) == 'right'")
        .encode(y=alt.Y("place:Q"), text="name:N"),
        base.mark_text(align="right", dx=-10)
        .transform_filter("(width < 420 ? datum.narrow : datum.side) == 'left'")
        .encode(y=alt.Y("place:Q"), text="name:N"),
    ).properties(width="container", height=HEIGHT, autosize=FIT)
    said = "; ".join(f"{v['name']} {v['cosine']:.4f}, {significant(v['frechet'])}" for v in values)
    return specification(chart, f"Cosine and Frechet distance of each row: {said}.")


def _references(curve: Points, found: list[Row], score: str) -> tuple[float, float, Points]:
    """Return the vertical range, and the baselines with the places of their labels.

    The range belongs to the curve. A baseline further from it than 1.5 of its spans would flatten
    it: it gets no rule but a label with its value and an arrow at the edge.
    """
    levels = [item["value"] for item in curve]
    span = max(max(levels) - min(levels), 0.02 * abs(max(levels)), 1e-6)
    window = min(levels) - 1.5 * span, max(levels) + 1.5 * span
    rules: Points = []
    for row in found:
        value = row.number(score)
        if row.kind == "baseline" and value is not None:
            shown = window[0] <= value <= window[1]
            arrow = (
                "" if shown else "\N{DOWNWARDS ARROW}" if value < window[0] else "\N{UPWARDS ARROW}"
            )
            label = row.label if shown else f"{arrow} {row.label} {significant(value)}"
            rules.append({"name": row.label, "value": value, "shown": shown, "text": label})
    levels += [rule["value"] for rule in rules if rule["shown"]]
    low, high = margins(levels, 0.12, 0.12)
    places = _spread([min(max(rule["value"], low), high) for rule in rules], low, high)
    for rule, place in zip(rules, places, strict=True):
        rule["place"] = place
    return low, high, rules


def _spread(levels: list[float], low: float, high: float) -> list[float]:
    """Return places for labels at these levels that keep `LABEL_GAP` pixels between neighbours."""
    gap = LABEL_GAP * (high - low) / HEIGHT
    places = list(levels)
    order = sorted(range(len(levels)), key=lambda index: levels[index])
    for lower, upper in zip(order, order[1:]):
        places[upper] = max(places[upper], places[lower] + gap)
    for below, index in enumerate(reversed(order)):
        places[index] = min(places[index], high - below * gap)
    return places


def _choose_sides(
    values: Points, across: tuple[float, float], up: tuple[float, float], log: bool
) -> tuple[float, float]:
    """Put a label on the left of its point where another point stands close on the right.

    On a phone every label turns inwards instead.

    Returns:
        The horizontal range, widened to the left where a label on the left needs the room.
    """
    scaled = math.log if log else float
    left, right = map(scaled, across)
    width = right - left
    wanted = left
    for item in values:
        level = scaled(item["frechet"])
        crowded = any(
            0 < scaled(other["frechet"]) - level < 0.2 * width
            and abs(other["cosine"] - item["cosine"]) < 0.07 * (up[1] - up[0])
            for other in values
        )
        item["narrow"] = "left" if level - left > 0.6 * width else "right"
        item["side"] = "left" if crowded else "right"
        if crowded:
            room = min(LETTER * len(item["name"]), 0.5)
            wanted = min(wanted, (level - room * right) / (1 - room))
    return math.exp(wanted) if log else wanted, across[1]
