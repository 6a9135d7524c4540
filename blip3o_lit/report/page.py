"""The page of a run: summary, scores beside baselines, charts, how to repeat it.

To add a section, write a function that takes a `RunRecord` and returns a `Section`, or None where
the run has nothing for it; name it here, and write its macro in `templates/sections.html.j2`.
"""

from pathlib import Path

from blip3o_lit.report import about_run, captions, drawings, further, held_out
from blip3o_lit.report.record import RunRecord
from blip3o_lit.report.templating import write_page

SECTIONS = (
    *(drawings.drawings, held_out.result, held_out.positions, held_out.sampling),
    *(drawings.hidden_half, drawings.named, captions.retrieval, captions.images),
    *(further.stores, further.against, further.samples, further.fitted_solvers, further.times),
    *(further.paired, further.rest),
    *(about_run.training, about_run.configuration, about_run.environment, about_run.repeat),
)
"""From the page's top."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory from the files that stand there.

    Each of them may be missing, the page then says so. Returns the page's path.
    """
    record = RunRecord.load(Path(run_dir))
    sections = [section for make in SECTIONS if (section := make(record)) is not None]
    target = record.path / "report.html"
    return write_page("report.html.j2", target, sections, held_out.opening(record))
