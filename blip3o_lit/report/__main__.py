"""Write a run's report again, or draw its main picture.

python -m blip3o_lit.report RUN_DIR [--picture FILE.png]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from blip3o_lit.config.errors import UserError
from blip3o_lit.report.page import write_report
from blip3o_lit.report.pictures import draw_picture


def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit code: 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(prog="python -m blip3o_lit.report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a run directory, such as outputs/<run>")
    parser.add_argument("--picture", type=Path, help="draw the main picture into this PNG instead")
    given = parser.parse_args(words)
    try:
        if given.picture is None:
            written = write_report(given.run_dir)
        else:
            written = draw_picture(given.run_dir, given.picture)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(written)
    return 0


if __name__ == "__main__":
    sys.exit(main())
