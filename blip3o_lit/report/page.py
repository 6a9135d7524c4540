"""One offline HTML page of a run: summary, scores beside baselines, charts, how to repeat it.

The page carries its styles, scripts and numbers itself. Its content security policy allows exactly
its own two scripts by hash and no request at all, so a name that a run brought in can't run code.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import cache
from pathlib import Path

import vl_convert
from markupsafe import Markup

from blip3o_lit import __version__
from blip3o_lit.base.files import replacing
from blip3o_lit.report import about_run, captions, further, held_out
from blip3o_lit.report.images import images
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.section import Section
from blip3o_lit.report.templating import TEMPLATES, asset, theme

NAME = "report.html"
SECTIONS = (
    *(held_out.result, held_out.positions, held_out.sampling, captions.retrieval, images),
    *(further.against, further.samples, further.times, further.paired, further.rest),
    *(about_run.training, about_run.configuration, about_run.environment, about_run.repeat),
)
"""The sections of a run's page, from its top; each is left out where it returns None."""


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
    sections = [section for make in SECTIONS if (section := make(record)) is not None]
    return write_page("report.html.j2", record.path / NAME, sections, held_out.opening(record))


def write_page(template: str, target: Path, sections: list[Section], opening: object) -> Path:
    """Write a page, titled by its folder; a reader never sees half of it.

    Args:
        template: Draws the opening, and the sections below it.
        target: The file to write.
        sections: From the top.
        opening: What the template says before the first section.
    """
    specs = {name: spec for section in sections for name, spec in section.charts.items()}
    themes = {"light": theme(), "dark": theme(dark=True)}
    data = json.dumps({"specs": specs, "themes": themes}, allow_nan=False)
    bundle, script = chart_library(), asset("page.js")
    page = TEMPLATES.get_template(template).render(
        name=target.parent.resolve().name,
        opening=opening,
        sections=sections,
        charts=Markup(data.replace("<", "\\u003c")),
        bundle=bundle,
        script=script,
        hashes=Markup(f"{_hash(bundle)} {_hash(script)}"),
        style=asset("page.css"),
        version=__version__,
    )
    with replacing(target) as part:
        part.write_text(page, "utf-8")
    return target


@cache
def chart_library() -> Markup:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return Markup(bundle.replace("</script", "<\\/script"))


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
