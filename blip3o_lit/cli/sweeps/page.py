"""The page of a sweep, kept up to date while its jobs end, and the closing count of failures."""

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

from blip3o_lit.base.files import read_json
from blip3o_lit.cli.sweeps.jobs import CONSOLE_FILE

PATIENCE = 20.0
"""The page is not written again before so many times the time that it took to write."""
_next: dict[Path, float] = {}


def refresh(sweep_dir: Path, at_once: bool = False) -> Path | None:
    """Write `sweep.html` and `sweep.csv`, unless that was done a moment ago; return the page."""
    from blip3o_lit.report.sweep import is_sweep, write_sweep

    began = time.monotonic()
    if not is_sweep(sweep_dir) or (not at_once and began < _next.get(sweep_dir, 0.0)):
        return None
    page = write_sweep(sweep_dir)
    _next[sweep_dir] = began + (1 + PATIENCE) * (time.monotonic() - began)
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
        jobs = {path.parent: read_json(path) for path in folder.glob("*/job.json")}
        if jobs:
            counts = Counter(job["state"] for job in jobs.values())
            print(f"{len(jobs)} jobs: " + ", ".join(f"{n} {name}" for name, n in counts.items()))
        failed = [path for path, job in jobs.items() if job["state"] == "failed"]
        for path in sorted(failed, key=lambda path: (len(path.name), path.name)):
            print(f"  {path.name}: {jobs[path]['error']}; see {path / CONSOLE_FILE}")
            print(f"    {shlex.join(jobs[path]['overrides'])}")
        if page:
            print(f"sweep: {page}", flush=True)
        if failed:
            sys.exit(1)
