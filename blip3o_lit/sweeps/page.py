"""The page of a sweep, kept up to date while its jobs end, and the closing count of failures."""

from __future__ import annotations

import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from blip3o_lit.sweeps.job import CONSOLE_FILE, read_state

PATIENCE = 20.0
"""The page is not written again before so many times the time that it took to write."""
_next: dict[Path, float] = {}


def refresh(sweep_dir: Path, at_once: bool = False) -> Path | None:
    """Write `sweep.html` and `sweep.csv`, unless that was done a moment ago.

    Args:
        sweep_dir: The sweep's directory.
        at_once: Write in any case.

    Returns:
        The page's path, or None when it was not written.
    """
    from blip3o_lit.report.sweep import is_sweep, write_sweep

    began = time.monotonic()
    if not is_sweep(sweep_dir) or (not at_once and began < _next.get(sweep_dir, 0.0)):
        return None
    page = write_sweep(sweep_dir)
    took = time.monotonic() - began
    _next[sweep_dir] = began + (1 + PATIENCE) * took
    return page


class SweepPage(Callback):
    """Hydra's hook around a sweep, named in `conf/hydra_defaults.yaml`."""

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Refresh the page when a job of the basic launcher ends."""
        if config.hydra.mode == RunMode.MULTIRUN:
            refresh(Path(str(config.hydra.sweep.dir)))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Write the page, list the failures and say by the exit code whether there are any."""
        folder = Path(str(config.hydra.sweep.dir))
        page = refresh(folder, at_once=True)
        states = {path.parent: read_state(path.parent) for path in folder.glob("*/job.json")}
        failed = {path: state for path, state in states.items() if state["state"] == "failed"}
        if states:
            counts = Counter(state["state"] for state in states.values())
            print(f"{len(states)} jobs: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        for path, state in sorted(failed.items(), key=lambda item: _order(item[0])):
            print(f"  {path.name}: {state['error']}; see {path / CONSOLE_FILE}")
            print("    " + " ".join(shlex.quote(word) for word in state["overrides"]))
        if page:
            print(f"sweep: {page}", flush=True)
        if failed:
            sys.exit(1)


def _order(path: Path) -> tuple[int, str]:
    return int(path.name) if path.name.isdigit() else -1, path.name
