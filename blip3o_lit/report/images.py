"""The section about single images: the worst ones, and best, median and worst with pictures."""

from __future__ import annotations

import re
from typing import Any

from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite, mapping, mappings
from blip3o_lit.report.section import Section
from blip3o_lit.report.tables import table

PICTURE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=]+")
"""Pictures stand in the page itself; anything else is not shown."""
CAPTIONS = {
    "caption": "Caption",
    "caption_generated": "From generated tokens",
    "caption_true": "From true tokens",
}


def images(record: RunRecord) -> Section | None:
    """Return the images that the evaluation singles out.

    `worst` is a list of `{key, cosine, caption, source}`. `examples` maps best, median and worst to
    such lists, with `picture` (a data URL), `caption_generated` and `caption_true`: the captions
    that generated and true tokens retrieve.
    """
    examples = mapping(record.evaluation.get("examples"))
    groups = {
        name.capitalize(): [_card(item) for item in mappings(examples.get(name))]
        for name in ("best", "median", "worst")
    }
    groups = {name: cards for name, cards in groups.items() if cards}
    lowest = [
        [item.get("key", ""), _cosine(item), item.get("caption", ""), item.get("source", "")]
        for item in mappings(record.evaluation.get("worst"))
    ]
    if not groups and not lowest:
        return None
    worst = table(["Image", "Cosine", "Caption", "Source"], lowest)
    return Section("images", "Single images", {"groups": groups, "worst": worst})


def _card(item: dict[str, Any]) -> dict[str, Any]:
    picture = str(item.get("picture", ""))
    return {
        "key": item.get("key", ""),
        "cosine": _cosine(item) or "",
        "picture": picture if PICTURE.fullmatch(picture) else None,
        "caption": item.get("caption", ""),
        "captions": {label: item[key] for key, label in CAPTIONS.items() if item.get(key)},
    }


def _cosine(item: dict[str, Any]) -> str | None:
    value = finite(item.get("cosine"))
    return None if value is None else f"{value:.4f}"
