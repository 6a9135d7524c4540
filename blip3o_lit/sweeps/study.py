"""`hparams_search=optuna`: an Optuna study over the jobs of a sweep, which survives its own end.

Trials are asked for in batches: all parameters of a batch are in `study.jsonl` before its first job
starts, and all results are told when its last job has ended. So what a trial sees is a function of
the seed and of the earlier batches alone, and a study that was killed and goes on has the trials of
one that was not. Each parameter of each trial is drawn by a sampler of its own seed.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from blip3o_lit.config.errors import UserError, one_of, positive
from blip3o_lit.sweeps.job import Job
from blip3o_lit.sweeps.launcher import PLUGIN_MODULE, ProcessLauncher
from blip3o_lit.sweeps.space import distribution, suggest

if TYPE_CHECKING:
    import optuna

PRUNERS = ("median", "none")
FILE = "study.jsonl"


@dataclass
class OptunaSweeperConf:
    """`hydra/sweeper=optuna`; `hparams_search=optuna` adds the launcher and a search space."""

    _target_: str = f"{PLUGIN_MODULE}.OptunaSweeper"
    n_trials: int = 20
    """Trials of the study, those of earlier sweeps included: a larger number goes on."""
    seed: int = 0
    """Seed of the sampler."""
    startup_trials: int = 10
    """Random trials before the tree-structured Parzen estimator takes over."""
    pruner: str = "median"
    """median stops trials whose validation cosine is below the median of the earlier ones; none."""
    pruner_startup_trials: int = 5
    """Trials that run to their end before one is stopped."""
    pruner_warmup_steps: int = 0
    """Training steps in which no trial is stopped."""
    study: str | None = None
    """Name of the study and of its folder; null: a hash of what is searched."""
    params: dict[str, str] = field(default_factory=dict)
    """The search space, key by key; a key on the command line replaces its entry."""


class OptunaSweeper(Sweeper):
    """Asks for batches of trials, has the process launcher run them, tells their results."""

    __module__ = PLUGIN_MODULE

    def __init__(
        self,
        n_trials: int,
        seed: int,
        startup_trials: int,
        pruner: str,
        pruner_startup_trials: int,
        pruner_warmup_steps: int,
        study: str | None,
        params: DictConfig,
    ) -> None:
        """Take the options of `hydra.sweeper`."""
        self.n_trials, self.seed, self.startup_trials = n_trials, seed, startup_trials
        self.pruner, self.pruner_startup = pruner, pruner_startup_trials
        self.pruner_warmup, self.name, self.params = pruner_warmup_steps, study, params

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra knows, and the launcher."""
        one_of("hydra.sweeper.pruner", self.pruner, PRUNERS)
        positive("hydra.sweeper.n_trials", self.n_trials)
        self._context, self._config = hydra_context, config
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, ProcessLauncher):
            raise UserError("hparams_search=optuna needs hydra/launcher=process (or slurm)")
        self.runner = launcher

    def sweep(self, arguments: list[str]) -> None:
        """Run the study to its last trial.

        Raises:
            UserError: If nothing is searched, Optuna is not installed, or the folder holds another
                study or a busy one.
        """
        if importlib.util.find_spec("optuna") is None:
            raise UserError("hparams_search=optuna needs Optuna: pip install 'blip3o-lit[sweep]'")
        given = [f"{key}={value}" for key, value in self.params.items()] + arguments
        overrides = OverridesParser.create(self._context.config_loader).parse_overrides(given)
        by_key = {item.get_key_element(): item for item in overrides}
        space = {key: item for key, item in by_key.items() if item.is_sweep_override()}
        fixed = [
            f"{key}={item.get_value_element_as_str()}"
            for key, item in by_key.items()
            if key not in space
        ]
        if not space:
            raise UserError(
                "nothing to search: give a key a range, for example "
                "optimizer.lr='tag(log,interval(1e-4,1e-2))'"
            )
        definition = self._definition(space, fixed)
        with open_dict(self._config):
            self._config.hydra.sweeper.study = self.name or f"optuna-{definition[:8]}"
        folder = Path(str(self._config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, folder / "multirun.yaml")
        with (folder / "study.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another sweep is at work on this study") from None
            study, batch = self._open(folder, definition)
            self._go(study, batch, {key: distribution(item) for key, item in space.items()}, fixed)

    def _definition(self, space: dict[str, Override], fixed: list[str]) -> str:
        """Return a hash of all that decides the trials, but for their number."""
        facts = [sorted(str(item.input_line) for item in space.values()), sorted(fixed), self.seed]
        facts += [self.startup_trials, self.pruner, self.pruner_startup, self.pruner_warmup]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def _open(self, folder: Path, definition: str) -> tuple[optuna.Study, int]:
        """Open or begin the study of a folder; returns the trials of a batch too."""
        import optuna
        from optuna.storages.journal import JournalStorage

        from blip3o_lit.sweeps.sampler import StudyFile, TrialSeededSampler

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = (
            optuna.pruners.MedianPruner(self.pruner_startup, self.pruner_warmup)
            if self.pruner == "median"
            else optuna.pruners.NopPruner()
        )
        study = optuna.create_study(
            storage=JournalStorage(StudyFile(folder / FILE)),
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
            sampler=TrialSeededSampler(self.seed, self.startup_trials),
            pruner=pruner,
        )
        known = study.user_attrs
        if known.setdefault("definition", definition) != definition:
            raise UserError(f"{folder} holds a study of another search: choose another folder")
        study.set_user_attr("definition", definition)
        batch = known.get("batch", self.runner.n_jobs)
        study.set_user_attr("batch", batch)
        if study.trials:
            print(f"the study in {folder} goes on: {len(study.trials)} trials so far", flush=True)
        return study, batch

    def _go(
        self,
        study: optuna.Study,
        batch: int,
        space: dict[str, optuna.distributions.BaseDistribution],
        fixed: list[str],
    ) -> None:
        """Run batch after batch."""
        from optuna.trial import Trial

        while True:
            known = study.get_trials(deepcopy=False)
            ended = [trial.number for trial in known if trial.state.is_finished()]
            first = next(number for number in range(len(ended) + 1) if number not in ended)
            if first >= self.n_trials:
                break
            last = min((first // batch + 1) * batch, self.n_trials)
            trials = [Trial(study, t._trial_id) for t in known[first:] if not t.state.is_finished()]
            trials += [study.ask() for _ in range(len(known), last)]
            work = []
            for trial in trials:
                words = [f"{key}={suggest(trial, key, space[key])}" for key in space]
                work += self.runner.prepare([[*fixed, *words]], trial.number)
            self._run_batch(study, trials, work)
        _closing(study)

    def _run_batch(self, study: optuna.Study, trials: list[optuna.Trial], work: list[Job]) -> None:
        """Run the jobs of a batch, stop those that are pruned, then tell all results."""
        by_number = {trial.number: trial for trial in trials}
        pruned: set[int] = set()

        def watch(job: Job) -> bool:
            if job.number in pruned or not follow(study, by_number[job.number], job):
                return False
            pruned.add(job.number)
            return True

        self.runner.run(work, watch)
        for job in work:
            watch(job)
            tell(study, by_number[job.number], job, job.number in pruned)


def follow(study: optuna.Study, trial: optuna.Trial, job: Job) -> bool:
    """Report a job's new validations; return whether the trial is to be stopped at one of them."""
    known = study.get_trials(deepcopy=False)[trial.number].intermediate_values
    for step, value in validations(job.folder / "metrics.csv"):
        if step not in known:
            trial.report(value, step)
        if trial.should_prune():
            return True
    return False


def validations(path: Path) -> Iterator[tuple[int, float]]:
    """Yield step and finite validation cosine of the whole lines of a metrics.csv."""
    text = path.read_text() if path.is_file() else ""
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        value = row.get("val/cosine")
        if value and math.isfinite(float(value)):
            yield int(row["step"]), float(value)


def tell(study: optuna.Study, trial: optuna.Trial, job: Job, pruned: bool) -> None:
    """Tell the study what became of a trial: its cosine, pruned, or failed with the reason."""
    from optuna.trial import TrialState

    objective = job.objective
    interval = (job.result.get("best") or {}).get("cosine_ci95")
    if interval:
        trial.set_user_attr("cosine_ci95", interval)
    if job.state == "failed" or (objective is None and not pruned):
        trial.set_user_attr("error", job.error or "no finite held-out cosine")
        study.tell(trial, state=TrialState.FAIL)
    elif pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, objective)


def _closing(study: optuna.Study) -> None:
    """Print how the trials ended, and the best."""
    states = [trial.state.name.lower() for trial in study.trials]
    counts = ", ".join(f"{states.count(name)} {name}" for name in sorted(set(states)))
    print(f"{len(states)} trials: {counts}")
    if "complete" in states:
        best = study.best_trial
        settings = " ".join(f"{key}={value}" for key, value in best.params.items())
        low_high = best.user_attrs.get("cosine_ci95")
        sure = f" (95 %: {low_high[0]:.4f} to {low_high[1]:.4f})" if low_high else ""
        print(f"best: cosine {best.value:.4f}{sure} by trial {best.number}: {settings}")


def register() -> None:
    """Put the sweeper's group into Hydra's store."""
    ConfigStore.instance().store(
        group="hydra/sweeper", name="optuna", node=OptunaSweeperConf, provider="blip3o_lit"
    )
