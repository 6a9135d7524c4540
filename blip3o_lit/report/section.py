"""A section of a page, and how a number says what it belongs to."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import Row, finite


@dataclass
class Section:
    """A titled part of the page and the charts that it draws."""

    identifier: str
    title: str
    body: str
    intro: str = ""
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def html(self) -> str:
        """Return the section as HTML."""
        intro = f'<p class="intro">{self.intro}</p>' if self.intro else ""
        heading = f'<h2 id="{self.identifier}-title">{escape(self.title)}</h2>'
        return (
            f'<section id="{self.identifier}" aria-labelledby="{self.identifier}-title">'
            f"{heading}{intro}{self.body}</section>"
        )


def source(record: RunRecord, row: Row | None = None, images: float | None = None) -> str:
    """Return what a number belongs to: estimator, images, split, mode, checkpoint, tokens.

    Args:
        record: The run.
        row: The estimator that made the number, where it is one.
        images: How many images, where not those of the whole evaluation.
    """
    about = record.evaluation
    parts: list[str] = []
    if row is not None:
        nfe = row.number("nfe")
        parts.append(row.label + (f", {nfe:.4g} NFE" if nfe is not None else ""))
    images = images or finite(about.get("images"))
    if images is not None:
        parts.append(f"{images:,.0f} images of {about.get('split', 'an unnamed split')}")
    for name in ("mode", "checkpoint", "tokens"):
        if about.get(name):
            value = str(about[name])
            parts.append(value if name == "mode" else f"{name} {value[:12]}")
    return ", ".join(parts)
