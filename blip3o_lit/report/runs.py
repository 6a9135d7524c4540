"""The runs below a folder: what each one is and reached; and old ones pruned, on request alone.

python -m blip3o_lit.report runs [DIR] [--prune unfinished|unscored|all] [--older-than DAYS]
                                       [--keep N] [--confirm KEY]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from blip3o_lit.base.files import claimed
from blip3o_lit.base.units import gib
from blip3o_lit.config.errors import UserError
from blip3o_lit.report.record import RunRecord, finite

DAY = 24 * 3600.0
MARKS = ("config.yaml", "environment.json")
"""Files that a folder has to have to be taken for a run."""
QUIET = ("hydra.", "resume=", "overwrite=")
"""Overrides that say nothing of what was trained."""
PRUNED = ("unfinished", "unscored", "all")


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    started: float
    size: int
    state: str
    """finished, cut, or unfinished."""
    step: int | None
    score: float | None
    verdict: str
    what: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Tell a parser of the words after `runs`."""
    parser.add_argument("folder", type=Path, nargs="?", default=Path("outputs"))
    parser.add_argument("--prune", choices=PRUNED, help="which runs to remove")
    parser.add_argument("--older-than", type=float, default=0.0, help="days since the last change")
    parser.add_argument("--keep", type=int, default=0, help="the newest N of them stay")
    parser.add_argument("--confirm", default="", help="the key that the list of --prune ends with")


def main(given: argparse.Namespace) -> None:
    """Print the runs; with `--prune` those to go, and with the key of that list remove them."""
    runs = find_runs(given.folder)
    if given.prune is None:
        show(runs, given.folder)
        return
    chosen = prunable(runs, given.prune, given.older_than, given.keep)
    show(chosen, given.folder)
    if not chosen:
        return
    key = key_of(chosen)
    whole = f"{len(chosen)} runs, {gib(sum(run.size for run in chosen))}"
    if not given.confirm:
        print(f"{whole}: nothing was removed; to remove them, add --confirm {key}")
        return
    if given.confirm != key:
        raise UserError(
            f"--confirm {given.confirm} is not the key of this list: leave it out and look again"
        )
    for run in chosen:
        with claimed(run.path, "run"):
            shutil.rmtree(run.path)
    print(f"removed: {whole}")


def find_runs(folder: Path) -> list[Run]:
    """Return the runs at or below a folder, the newest first; links are not followed."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: name the one that holds runs, such as outputs")
    paths = [Path(place) for place, _, files in os.walk(folder) if {*MARKS} <= {*files}]
    return sorted(map(_run, paths), key=lambda run: run.started, reverse=True)


def prunable(runs: list[Run], which: str, days: float, keep: int) -> list[Run]:
    """Return the runs that a request names; one that holds another run is never among them."""
    paths = [run.path for run in runs]
    chosen = [
        run
        for run in runs
        if (which != "unfinished" or run.state != "finished")
        and (which != "unscored" or run.score is None)
        and not any(run.path in path.parents for path in paths)
    ]
    return [run for run in chosen[keep:] if time.time() - _touched(run.path) >= days * DAY]


def key_of(runs: list[Run]) -> str:
    """Return a word that stands for these runs as they are: another list has another one."""
    text = "\n".join(f"{run.path.resolve()} {run.size} {run.step}" for run in runs)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def show(runs: list[Run], folder: Path) -> None:
    """Print a table of runs: when, which, what, how far, score, verdict, size."""
    table = Table("when", "run", "what", "step", "score", "verdict", "size")
    for run in runs:
        name = run.path.relative_to(folder) if run.path != folder else run.path
        state = "" if run.state == "finished" else f" ({run.state})"
        table.add_row(
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started)),
            escape(str(name)),
            escape(run.what),
            f"{'' if run.step is None else run.step}{state}",
            "" if run.score is None else f"{run.score:.4f}",
            run.verdict,
            gib(run.size),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    print(f"{len(runs)} runs, {gib(sum(run.size for run in runs))}, below {folder}")


def _run(path: Path) -> Run:
    record = RunRecord.load(path)
    result, words = record.result, record.overrides
    best: dict[str, Any] = result.get("best") or {}
    state = "finished" if result.get("finished") else "cut" if "cut" in result else "unfinished"
    step = result.get("step")
    stats = [file.lstat() for file in path.rglob("*") if not file.is_dir()]
    sizes = {(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}  # last.ckpt is a 2nd name
    said = record.evaluation.get("standing", "")
    return Run(
        path=path,
        started=(path / "environment.json").stat().st_mtime,
        size=sum(sizes.values()),
        state=state,
        step=step if isinstance(step, int) else _last_step(record),
        score=finite(best.get("cosine")),
        verdict=said if isinstance(said, str) else "",
        what=" ".join(word for word in words if not word.startswith(QUIET)),
    )


def _last_step(record: RunRecord) -> int | None:
    steps = [int(points[-1][0]) for points in record.metrics.values() if points]
    return max(steps, default=None)


def _touched(path: Path) -> float:
    return max(file.lstat().st_mtime for file in (path, *path.rglob("*")))
