"""The launcher of sweeps that may fail: each job in its own process, a few at a time.

`hydra/launcher=process` starts `python -m blip3o_lit.train ... hydra.run.dir=SWEEP/NUMBER`, so all
ranks of a job see one config and one directory, and memory, CUDA context and process groups end
with the job. `hydra/launcher=slurm` does the same through `sbatch --wait`.
"""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from blip3o_lit.base.launcher import launch
from blip3o_lit.base.words import override, pasteable
from blip3o_lit.cli.schema import given_folders
from blip3o_lit.cli.sweeps.jobs import CONSOLE_FILE, Job
from blip3o_lit.cli.sweeps.page import refresh
from blip3o_lit.config.errors import UserError, positive

PLUGIN_MODULE = "hydra_plugins.blip3o_lit"
"""Hydra takes plugins by this prefix only; `plugins.py` stands in for the module."""
SECONDS_BETWEEN_LOOKS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
OWN_KEYS = ("hydra.sweep", "hydra.launcher", "hydra/launcher", "hydra/sweeper", "hydra.mode")
"""Hydra's own keys that concern the sweep and not its jobs."""


@dataclass
class ProcessLauncherConf:
    _target_: str = f"{PLUGIN_MODULE}.ProcessLauncher"
    n_jobs: int = 1
    """Jobs at work at a time."""
    command: list[str] = field(default_factory=list)
    """Words to start a job with; empty: this Python with -m and the command's module."""


@dataclass
class SlurmLauncherConf(ProcessLauncherConf):
    n_jobs: int = 8
    command: list[str] = field(default_factory=lambda: ["sbatch", "--wait", "scripts/train.sbatch"])


class ProcessLauncher(Launcher):
    """Runs jobs in processes, `n_jobs` at a time; a failed one does not stop the others."""

    __module__ = PLUGIN_MODULE

    def __init__(self, n_jobs: int, command: Sequence[str]) -> None:
        self.n_jobs, self.command = n_jobs, list(command)
        self.working: list[Job] = []
        self.received: int | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
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
        jobs = [self.prepare(words, initial_job_idx + i) for i, words in enumerate(job_overrides)]
        self.run(jobs)
        return [
            JobReturn(job.overrides, status=JobStatus.COMPLETED, _return_value=job.objective)
            for job in jobs
        ]

    def prepare(self, words: Sequence[str], number: int) -> Job:
        """Compose a job's config, which checks it, and give it its folder and command.

        The config is written before the job starts: one that fails at once is in the table too.
        """
        config = self.hydra_context.config_loader.load_sweep_config(self.config, list(words))
        with open_dict(config):
            config.hydra.job.num = config.hydra.job.id = number
        folder = Path(str(self.config.hydra.sweep.dir)).absolute() / str(config.hydra.sweep.subdir)
        if not (folder / "config.yaml").is_file():
            folder.mkdir(parents=True, exist_ok=True)
            names = [str(key) for key in config if key != "hydra"]
            OmegaConf.save(OmegaConf.masked_copy(config, names), folder / "config.yaml", True)
        overrides = [word for word in words if not word.startswith("hparams_search=")]
        own = [w for w in self.config.hydra.overrides.hydra if not w.startswith(OWN_KEYS)]
        start = self.command or [sys.executable, "-m", f"blip3o_lit.{self.config.hydra.job.name}"]
        place = override("hydra.run.dir", folder)
        flags = [f"--config-dir={given}" for given in given_folders]
        return Job(number, folder, overrides, [*start, *flags, *overrides, *own, place])

    def run(self, jobs: list[Job], prune: Callable[[Job], bool] = lambda job: False) -> None:
        """Run jobs of one sweep to their end, in their order.

        Ctrl-C and a scheduler's signals go on to the jobs at work; when those have saved, this
        process ends. `prune` looks at each job at work now and then; True stops the job.
        """
        if not jobs:
            return
        handlers = {number: signal.signal(number, self._forward) for number in SIGNALS}
        try:
            self._work(jobs, prune)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.received is not None:
            root = jobs[0].folder.parent
            refresh(root, at_once=True)
            word = pasteable("hydra.sweep.dir", root)
            print(f"the sweep stopped; to go on, give the same command with {word}", flush=True)
            sys.exit(130 if self.received == signal.SIGINT else 75)

    def _work(self, jobs: list[Job], prune: Callable[[Job], bool]) -> None:
        shared = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
        waiting = list(jobs)
        while self.working or (waiting and self.received is None):
            if self.received is None:
                for job in waiting[: self.n_jobs - len(self.working)]:
                    if job.try_start():
                        self.working.append(job)
                waiting = [job for job in waiting if job.state == "waiting"]
            ended = [job for job in self.working if job.ended()]
            for job in ended:
                self.working.remove(job)
                _print_end(job, shared)
                refresh(job.folder.parent)
            for job in self.working:
                if not job.stopping and prune(job):
                    job.stop()
            if not ended:
                time.sleep(SECONDS_BETWEEN_LOOKS)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for job in self.working:
            job.stop(number)


def _print_end(job: Job, shared: set[str]) -> None:
    """Print how a job ended, in one line, with the overrides that not all jobs share."""
    words = {
        "done": "was done before" if job.earlier else f"done in {job.seconds:.1f} s",
        "stopped": f"stopped after {job.seconds:.1f} s",
        "failed": f"FAILED: {job.error}; see {job.folder / CONSOLE_FILE}",
    }
    score = job.objective if job.state == "done" else None
    cosine = "" if score is None else f", cosine {score:.4f}"
    own = shlex.join(word for word in job.overrides if word not in shared)
    print(f"job {job.number} ({own}): {words[job.state]}{cosine}", flush=True)
