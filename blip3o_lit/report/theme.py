"""Colours of the charts in light and dark; everything else about them is the same."""

from __future__ import annotations

from typing import Any

FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


def theme(
    ink: str, muted: str, line: str, page: str, category: list[str], font: str = FONT
) -> dict[str, Any]:
    """Return a Vega-Lite config: hairline axes, no frame, colours that hold on `page`.

    Args:
        ink: Colour of labels on the data.
        muted: Colour of axis labels, rules and reference lines.
        line: Colour of the grid.
        page: Background.
        category: Colours of the series, told apart with colour-blind eyes too.
        font: Font family.
    """
    return {
        "background": page,
        "font": font,
        "padding": 2,
        "view": {"stroke": None},
        "axis": {
            "domain": False,
            "ticks": False,
            "grid": True,
            "gridColor": line,
            "labelColor": muted,
            "titleColor": muted,
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "labelPadding": 6,
            "titlePadding": 8,
            "labelFlush": False,
        },
        "legend": {
            "orient": "top",
            "title": None,
            "labelColor": ink,
            "titleColor": muted,
            "labelFontSize": 12,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "symbolType": "circle",
            "symbolSize": 70,
            "offset": 8,
            "columnPadding": 14,
        },
        "title": {"color": ink, "fontSize": 13, "fontWeight": 600, "anchor": "start", "offset": 10},
        "text": {"color": ink, "fontSize": 11},
        "rule": {"color": muted},
        "line": {"strokeWidth": 2, "strokeJoin": "round"},
        "point": {"filled": True, "size": 60},
        "style": {"halo": {"stroke": page, "strokeWidth": 5, "strokeJoin": "round"}},
        "range": {"category": category, "heatmap": {"scheme": "viridis"}},
    }


LIGHT = theme(
    ink="#23211d",
    muted="#69645b",
    line="#e9e5dd",
    page="#ffffff",
    category=["#1f66b0", "#c4551d", "#2a7f62", "#8a4fa8", "#a07a00", "#b83a5e"],
)
DARK = theme(
    ink="#ebe7e0",
    muted="#a09a90",
    line="#2f3136",
    page="#1d1f23",
    category=["#74b0f0", "#f0965c", "#65c7a2", "#c79be0", "#dcbc4e", "#f08aa6"],
)
