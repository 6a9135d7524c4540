"""A section of a page: plain data for a template, and the charts that stand in it.

To add one, write a function that takes a `RunRecord` and returns a `Section`, or None where the run
has nothing for it; name it in `page.SECTIONS`; and write the macro of its name in
`templates/sections.html.j2`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Section:
    """A titled part of the page.

    Attributes:
        name: Its anchor on the page, and the macro of `templates/sections.html.j2` that draws it.
        title: Its heading, and its word in the page's list of sections.
        data: What the macro takes; strings are escaped there.
        charts: Vega-Lite specifications by name; the macro places them by `figure(name, ...)`.
    """

    name: str
    title: str
    data: dict[str, Any] = field(default_factory=dict)
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
