"""The launcher of sweeps that may fail: each job in its own process, a few at a time.

`hydra/launcher=process` starts `python -m blip3o_lit.train ... hydra.run.dir=SWEEP/NUMBER`, so all
ranks of a job see one config and one directory, and memory, CUDA context and process groups end
with the job. `hydra/launcher=slurm` does the same through `sbatch --wait`.
"""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from blip3o_lit.config.errors import UserError, positive
from blip3o_lit.config.words import override, pasteable
from blip3o_lit.launcher import launch
from blip3o_lit.sweeps.job import CONSOLE_FILE, Job
from blip3o_lit.sweeps.page import refresh

PLUGIN_MODULE = "hydra_plugins.blip3o_lit"
"""Hydra takes plugins by this prefix only; they are registered by `plugins.py`."""
SECONDS_BETWEEN_LOOKS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
OWN_KEYS = ("hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper", "hydra.mode")
"""Hydra's own keys that concern the sweep and not its jobs."""

Watch = Callable[[Job], bool]


@dataclass
class ProcessLauncherConf:
    """`hydra/launcher=process`."""

    _target_: str = f"{PLUGIN_MODULE}.ProcessLauncher"
    n_jobs: int = 1
    """Jobs at work at a time."""
    command: list[str] = field(default_factory=list)
    """Words to start a job with; empty: this Python with -m and the command's module."""


@dataclass
class SlurmLauncherConf(ProcessLauncherConf):
    """`hydra/launcher=slurm`: a Slurm job a job, by the sbatch script of `scripts/`."""

    n_jobs: int = 8
    command: list[str] = field(default_factory=lambda: ["sbatch", "--wait", "scripts/train.sbatch"])


class ProcessLauncher(Launcher):
    """Runs jobs in processes, `n_jobs` at a time; a failed one does not stop the others."""

    __module__ = PLUGIN_MODULE

    def __init__(self, n_jobs: int, command: Sequence[str]) -> None:
        """Take the options of the group `hydra/launcher`."""
        self.n_jobs = n_jobs
        self.command = list(command)
        self.received: int | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra knows."""
        self.hydra_context, self.config = hydra_context, config
        positive("hydra.launcher.n_jobs", self.n_jobs)
        this = launch()
        if (this.world or 1) > 1:
            raise UserError(
                f"{this.by} started {this.world} processes: a sweep is started once, not by every "
                "rank: run it without torchrun or srun; its jobs start their own ranks"
            )

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run a batch of jobs to its end, failures included; the page's callback counts them."""
        jobs = self.prepare(job_overrides, initial_job_idx)
        self.run(jobs)
        return [_job_return(job) for job in jobs]

    def prepare(self, job_overrides: Sequence[Sequence[str]], first: int) -> list[Job]:
        """Compose each job's config, which checks it, and give each its folder and command."""
        jobs = []
        name = self.config.hydra.job.name
        start = self.command or [sys.executable, "-m", f"blip3o_lit.{name}"]
        kept = [w for w in self.config.hydra.overrides.hydra if not w.startswith(OWN_KEYS)]
        root = Path(str(self.config.hydra.sweep.dir)).absolute()
        for number, words in enumerate(job_overrides, first):
            overrides = [word for word in words if not word.startswith("hparams_search=")]
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
            with open_dict(config):
                config.hydra.job.num = config.hydra.job.id = number
            folder = root / str(config.hydra.sweep.subdir)
            place = [*kept, override("hydra.run.dir", folder)]
            jobs.append(Job(number, folder, overrides, [*start, *overrides, *place]))
            _write_config(config, folder)
        return jobs

    def run(self, jobs: list[Job], watch: Watch | None = None) -> None:
        """Run jobs to their end.

        Args:
            jobs: In the order in which they are started.
            watch: Looks at each job at work now and then; True stops the job.

        Raises:
            SystemExit: After Ctrl-C or a scheduler's signal, when all jobs at work have saved.
        """
        if not jobs:
            return
        root = jobs[0].folder.parent
        shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        waiting, working = list(jobs), []
        with self._forwarding(working):
            while working or (waiting and self.received is None):
                room = self.n_jobs - len(working) if self.received is None else 0
                for job in waiting[:room]:
                    if job.try_start():
                        waiting.remove(job)
                        working.append(job)
                ended = [job for job in working if job.ended()]
                for job in ended:
                    working.remove(job)
                    _say(job, shared)
                    refresh(root)
                for job in working:
                    if watch is not None and watch(job):
                        job.stop()
                if not ended:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        if self.received is not None:
            refresh(root, at_once=True)
            print(
                "the sweep stopped; to go on, give the same command with",
                pasteable("hydra.sweep.dir", root),
                flush=True,
            )
            sys.exit(130 if self.received == signal.SIGINT else 75)

    @contextmanager
    def _forwarding(self, working: list[Job]) -> Iterator[None]:
        """Send Ctrl-C and a scheduler's signals on to the jobs at work, once each."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.received = number
            for job in working:
                job.stop(number)

        before = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def register() -> None:
    """Put the launcher's groups into Hydra's store."""
    store = ConfigStore.instance()
    for name, node in (("process", ProcessLauncherConf), ("slurm", SlurmLauncherConf)):
        store.store(group="hydra/launcher", name=name, node=node, provider="blip3o_lit")


def _write_config(config: DictConfig, folder: Path) -> None:
    """Write a job's config before it starts, so that jobs that fail at once are in the table."""
    path = folder / "config.yaml"
    if path.is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = [str(key) for key in config if key != "hydra"]
    plain: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))


def _say(job: Job, shared: set[str]) -> None:
    """Print how a job ended, in one line, with the overrides that not all jobs share."""
    if job.state == "done":
        score = job.objective
        how = "was done before" if job.earlier else f"done in {job.seconds:.1f} s"
        how += f", cosine {score:.4f}" if score is not None else ""
    elif job.state == "stopped":
        how = f"stopped after {job.seconds:.1f} s"
    else:
        how = f"FAILED: {job.error}; see {job.folder / CONSOLE_FILE}"
    own = shlex.join(word for word in job.overrides if word not in shared)
    print(f"job {job.number} ({own}): {how}", flush=True)


def _job_return(job: Job) -> JobReturn:
    done = JobReturn()
    done.overrides, done.status = job.overrides, JobStatus.COMPLETED
    done.return_value = job.objective
    return done
