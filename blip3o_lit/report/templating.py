"""Pages by Jinja2, with every string of a run escaped, and the theme of the charts.

A page carries its styles, scripts and numbers itself. Its content security policy allows exactly
its own two scripts by hash and no request at all, so a name that a run brought in can't run code.
"""

import base64
import hashlib
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from blip3o_lit import __version__
from blip3o_lit.base.files import replacing

LOADER = jinja2.PackageLoader("blip3o_lit.report")
TEMPLATES = jinja2.Environment(
    loader=LOADER,
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass
class Section:
    """A titled part of a page; the macro of its name in `templates/sections.html.j2` draws it."""

    name: str
    title: str
    data: dict[str, Any] = field(default_factory=dict)
    """What the macro takes; strings are escaped there."""
    charts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Vega-Lite specifications by name; the macro places them by `figure(name, ...)`."""


def write_page(template: str, target: Path, sections: list[Section], opening: object) -> Path:
    """Write a page, titled by its folder; a reader never sees half of it.

    `opening` is what the template says before the first section.
    """
    specs = {name: spec for section in sections for name, spec in section.charts.items()}
    themes = {"light": theme(), "dark": theme(dark=True)}
    data = json.dumps({"specs": specs, "themes": themes}, allow_nan=False)
    bundle, script = _chart_library(), _asset("page.js")
    page = TEMPLATES.get_template(template).render(
        name=target.parent.resolve().name,
        opening=opening,
        sections=sections,
        charts=Markup(data.replace("<", "\\u003c")),
        bundle=bundle,
        script=script,
        hashes=Markup(f"{_hash(bundle)} {_hash(script)}"),
        style=_asset("page.css"),
        version=__version__,
    )
    with replacing(target) as part:
        part.write_text(page, "utf-8")
    return target


@cache
def theme(dark: bool = False) -> dict[str, Any]:
    return json.loads(TEMPLATES.get_template("theme.json.j2").render(dark=dark))


@cache
def _chart_library() -> Markup:
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(bundle.replace("</script", "<\\/script"))


def _asset(name: str) -> Markup:
    return Markup(LOADER.get_source(TEMPLATES, name)[0])


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
