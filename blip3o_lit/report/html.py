"""Pieces of HTML: tables, tiles, figures. Every string from a run is escaped here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from blip3o_lit.report.scores import MISSING, Row, finite, significant, text


def score_table(
    found: list[Row], columns: dict[str, tuple[str, str]], caption: str, identifier: str
) -> str:
    """Return a sortable table of scores; columns that no row has are left out.

    Args:
        found: The rows, in their first order.
        columns: Score -> (heading, meaning).
        caption: What the numbers belong to, as HTML.
        identifier: The table's id.
    """
    kept = {
        name: heading
        for name, heading in columns.items()
        if any(text(name, row) != MISSING for row in found)
    }
    head = _sort_head("Row", "name of the estimator or baseline", 0, left=True)
    for column, (heading, meaning) in enumerate(kept.values(), start=1):
        head += _sort_head(heading, meaning, column)
    body = []
    for row in found:
        cells = "".join(
            f'<td class="number" data-value="{_key(name, row)}">{escape(text(name, row))}</td>'
            for name in kept
        )
        body.append(
            f'<tr class="{escape(row.kind)}"><th scope="row" data-value="{escape(row.label)}">'
            f'<span title="{escape(row.key)}">{escape(row.label)}</span> '
            f"<small>{escape(row.kind)}</small></th>{cells}</tr>"
        )
    return _scroll(
        f'<table class="scores" id="{identifier}"><caption><span>{caption}</span></caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>",
        identifier,
    )


def plain_table(
    heads: Sequence[str],
    lines: Iterable[Sequence[object]],
    caption: str,
    identifier: str,
    sortable: bool = False,
) -> str:
    """Return a table whose first column names the row; numbers align right.

    Args:
        heads: The headings.
        lines: The rows, one cell a heading.
        caption: What the numbers belong to, as HTML.
        identifier: The table's id.
        sortable: Whether headings are buttons that sort.
    """
    table = [list(line) for line in lines]
    words = {0} | {
        column
        for column in range(1, len(heads))
        if any("number" not in _cell(line[column]) for line in table)
    }
    head = ""
    for column, name in enumerate(heads):
        if sortable:
            head += _sort_head(name, f"sort by {name}", column, left=column in words)
        else:
            kind = ' class="left"' if column in words else ""
            head += f'<th scope="col"{kind}>{escape(name)}</th>'
    body = []
    for first, *rest in table:
        cells = "".join(_cell(value) for value in rest)
        name = escape(str(first))
        body.append(f'<tr><th scope="row" data-value="{name}">{name}</th>{cells}</tr>')
    return _scroll(
        f'<table id="{identifier}"><caption><span>{caption}</span></caption>'
        f"<thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>",
        identifier,
    )


def facts(values: dict[str, Any], caption: str, identifier: str) -> str:
    """Return a two-column table of a nested dict, keys joined with dots."""
    lines = [(name, _plain(value)) for name, value in flatten(values).items()]
    table = plain_table(("Name", "Value"), lines, caption, identifier)
    return f'<div class="facts">{table}</div>'


def figure(name: str, caption: str, title: str = "", details: str = "", wide: bool = True) -> str:
    """Return the place where the page draws the chart `name`, and its caption (HTML)."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    kind = "wide" if wide else "snug"
    return (
        f'<figure class="figure {kind}">{heading}<div class="chart" data-chart="{escape(name)}">'
        '<p class="empty">This chart needs JavaScript.</p></div>'
        f"<figcaption>{caption}</figcaption>{details}</figure>"
    )


def details(summary: str, body: str) -> str:
    """Return a collapsed block."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def tile(label: str, value: str, beside: Sequence[tuple[str, str]], foot: str) -> str:
    """Return a summary tile: a number or phrase, what stands beside it, and what it belongs to."""
    lines = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(number)}</dd></div>" for name, number in beside
    )
    against = f"<dl>{lines}</dl>" if lines else ""
    size = "big" if len(value) < 12 else "phrase"
    return (
        f'<article class="tile"><h3>{escape(label)}</h3><p class="{size}">{escape(value)}</p>'
        f'{against}<p class="foot">{escape(foot)}</p></article>'
    )


def command(words: str, label: str, identifier: str) -> str:
    """Return a shell command with a button that copies it."""
    return (
        f'<div class="command"><p class="label">{escape(label)}</p>'
        f'<pre id="{identifier}" tabindex="0" aria-label="{escape(label)}"><code>{escape(words)}'
        f'</code></pre><button type="button" data-copy="{identifier}">Copy'
        f'<span class="hidden"> command: {escape(label)}</span></button></div>'
    )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as one level, keys joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _scroll(table: str, identifier: str) -> str:
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table, scrolls sideways"'
        f' data-for="{identifier}">{table}</div>'
    )


def _sort_head(heading: str, meaning: str, column: int, left: bool = False) -> str:
    kind = ' class="left"' if left else ""
    return (
        f'<th scope="col" aria-sort="none"{kind}><button type="button" data-column="{column}"'
        f' title="{escape(meaning)}">{escape(heading)}</button></th>'
    )


def _key(name: str, row: Row) -> str:
    """Return what the column sorts by; empty sorts last."""
    if name == "cosine_ci95":
        return f"{row.interval[0]!r}" if row.interval else ""
    value = row.number(name)
    return "" if value is None else repr(value)


def _plain(value: object) -> str:
    """Return a fact as text, which aligns left."""
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _cell(value: object) -> str:
    """Return a cell; a number, or its text, aligns right."""
    number = finite(value)
    if number is not None:
        value = f"{int(number):,}" if isinstance(value, int) else significant(number)
    shown = MISSING if value is None else str(value)
    kind = ' class="number"' if re.fullmatch(r"[-+.,e\d]+", shown) or shown == MISSING else ""
    key = "" if shown == MISSING else shown.replace(",", "") if number is None else repr(number)
    return f'<td{kind} data-value="{escape(key)}">{escape(shown)}</td>'
