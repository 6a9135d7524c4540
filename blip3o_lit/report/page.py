"""One offline HTML page of a run: summary, scores beside baselines, charts, how to repeat it.

The page carries its styles, scripts and numbers itself. Its content security policy allows exactly
its own two scripts by hash and no request at all, so a name that a run brought in can't run code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import vl_convert

from blip3o_lit import __version__
from blip3o_lit.config.files import replacing
from blip3o_lit.report.about_run import about_run
from blip3o_lit.report.held_out import held_out, lede
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.scores import finite
from blip3o_lit.report.section import Section
from blip3o_lit.report.theme import DARK, LIGHT

NAME = "report.html"


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files that stand there.

    Args:
        run_dir: Run directory; each of its files may be missing, the page then says so.

    Returns:
        The page's path.

    Raises:
        UserError: If `run_dir` is no directory, or a file in it can't be parsed.
    """
    record = RunRecord.load(Path(run_dir))
    blocks = [*held_out(record), *about_run(record)]
    page = render(
        title=f"{record.name}: run report",
        overline="blip3o_lit run report",
        heading=record.name,
        lede=lede(record),
        blocks=blocks,
    )
    return publish(record.path / NAME, page)


def publish(target: Path, page: str) -> Path:
    """Write a page under another name first, so that no reader ever sees half of it."""
    with replacing(target) as part:
        part.write_text(page, "utf-8")
    return target


def render(title: str, overline: str, heading: str, lede: str, blocks: list[Section]) -> str:
    """Return a whole page.

    Args:
        title: The document's title.
        overline: The line above the heading.
        heading: The page's name.
        lede: Opening paragraphs, as HTML.
        blocks: The sections and their charts.
    """
    specs = {name: spec for block in blocks for name, spec in block.charts.items()}
    bundle, script = chart_library(), _asset("page.js")
    data = json.dumps({"specs": _numbers(specs), "themes": {"light": LIGHT, "dark": DARK}})
    links = "".join(
        f'<li><a href="#{block.identifier}">{escape(block.title)}</a></li>' for block in blocks
    )
    return Template(_asset("page.html")).substitute(
        hashes=f"{_hash(bundle)} {_hash(script)}",
        version=escape(__version__),
        title=escape(title),
        style=_asset("page.css"),
        overline=escape(overline),
        heading=escape(heading),
        lede=lede,
        links=links,
        sections="\n".join(block.html for block in blocks),
        charts=data.replace("<", "\\u003c"),
        bundle=bundle,
        script=script,
    )


@cache
def chart_library() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script (0.9 MB, made in 1.6 s, no network)."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
        "</script", "<\\/script"
    )


def _asset(name: str) -> str:
    return resources.files("blip3o_lit.report").joinpath(name).read_text("utf-8")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def _numbers(value: Any) -> Any:
    """Return a specification with NaN and infinity as null, which JSON in a browser needs."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return None if isinstance(value, float) and finite(value) is None else value
