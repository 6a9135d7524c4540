"""Write the report of a run or of a sweep again, or one of a run's pictures alone; or list runs.

python -m blip3o_lit.report DIR [--picture FILE.png | --drawings FILE.png]
python -m blip3o_lit.report runs [DIR]
"""

import argparse
import sys
from pathlib import Path

from blip3o_lit.config.errors import UserError
from blip3o_lit.report import runs
from blip3o_lit.report.drawings import write_drawings
from blip3o_lit.report.page import write_report
from blip3o_lit.report.pictures import draw_picture
from blip3o_lit.report.sweep import is_sweep, write_sweep


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for a mistake of the user's."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["runs"]:
        return _listed(words[1:])
    parser = argparse.ArgumentParser(prog="python -m blip3o_lit.report", description=__doc__)
    parser.add_argument("folder", type=Path, help="outputs/train/<run> or outputs/sweeps/<sweep>")
    parser.add_argument("--picture", type=Path, help="draw the main picture into this PNG instead")
    parser.add_argument("--drawings", type=Path, help="put the drawn tokens into this PNG instead")
    given = parser.parse_args(words)
    try:
        if given.picture is not None:
            written = draw_picture(given.folder, given.picture)
        elif given.drawings is not None:
            written = write_drawings(given.folder, given.drawings)
        elif is_sweep(given.folder):
            written = write_sweep(given.folder)
        else:
            written = write_report(given.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0


def _listed(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m blip3o_lit.report runs",
        description="List the runs below a folder; with --prune, those that it would remove.",
    )
    runs.add_arguments(parser)
    try:
        runs.main(parser.parse_args(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
