"""The folder of templates: pages by Jinja2, with every string of a run escaped, and the theme."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

LOADER = jinja2.PackageLoader("blip3o_lit.report")
TEMPLATES = jinja2.Environment(
    loader=LOADER,
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def asset(name: str) -> Markup:
    """Return a file of the folder as it stands."""
    return Markup(LOADER.get_source(TEMPLATES, name)[0])


@cache
def theme(dark: bool = False) -> dict[str, Any]:
    """Return the Vega-Lite config of the charts."""
    return json.loads(TEMPLATES.get_template("theme.json.j2").render(dark=dark))
