"""The section about single images: the worst ones, and best, median and worst with pictures."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from blip3o_lit.report import html
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite, headline, mapping, rows
from blip3o_lit.report.section import Section, source

PICTURE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]+")
"""Pictures stand in the page itself; anything else is not shown."""


def images(record: RunRecord) -> Section | None:
    """Return the images that the evaluation singles out.

    `worst` is a list of `{key, cosine, caption, source}`. `examples` maps best, median and worst to
    such lists, with `picture` (a data URL), `caption_generated` and `caption_true`: the captions
    that generated and true tokens retrieve.
    """
    about = escape(source(record, headline(rows(record))))
    examples = mapping(record.evaluation.get("examples"))
    body = ""
    for name in ("best", "median", "worst"):
        cards = [_card(item) for item in _dicts(examples.get(name))]
        if cards:
            body += f'<h3>{name.capitalize()}</h3><div class="cards">{"".join(cards)}</div>'
    lowest = _dicts(record.evaluation.get("worst"))
    if lowest:
        lines = [
            [item.get("key", ""), _cosine(item), item.get("caption", ""), item.get("source", "")]
            for item in lowest
        ]
        body += html.plain_table(
            ["Image", "Cosine", "Caption", "Source"],
            lines,
            f"The images with the lowest cosine, worst first: {about}.",
            "worst-table",
        )
    if not body:
        return None
    return Section("images", "Single images", body, f"Cosine of one image each: {about}.")


def _card(item: dict[str, Any]) -> str:
    """Return one image with its cosine and captions."""
    caption = str(item.get("caption", ""))
    picture = str(item.get("picture", ""))
    shown = ""
    if PICTURE.fullmatch(picture):
        shown = f'<img src="{picture}" alt="{escape(caption)}" width="128" height="128">'
    lines = "".join(
        f"<div><dt>{label}</dt><dd>{escape(str(item[key]))}</dd></div>"
        for key, label in (
            ("caption", "Caption"),
            ("caption_generated", "From generated tokens"),
            ("caption_true", "From true tokens"),
        )
        if item.get(key)
    )
    name = escape(str(item.get("key", "")))
    return (
        f'<article class="card">{shown}<div><h4>{name}</h4>'
        f'<p class="value">{escape(_cosine(item) or "")}</p><dl>{lines}</dl></div></article>'
    )


def _cosine(item: dict[str, Any]) -> str | None:
    value = finite(item.get("cosine"))
    return None if value is None else f"{value:.4f}"


def _dicts(value: object) -> list[dict[str, Any]]:
    return [mapping(item) for item in value if mapping(item)] if isinstance(value, list) else []
