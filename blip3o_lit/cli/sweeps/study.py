"""`hparams_search=optuna`: an Optuna study over the jobs of a sweep, which survives its own end.

Trials are asked for in batches: all parameters of a batch are in `study.jsonl` before its first job
starts, and all results are told when its last job has ended. So what a trial sees is a function of
the seed and of the earlier batches alone, and a study that was killed and goes on has the trials of
one that was not. Each parameter of each trial is drawn by a sampler of its own seed.

Optuna is imported late: only a search needs it.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from blip3o_lit.cli.sweeps.jobs import Job
from blip3o_lit.cli.sweeps.launcher import PLUGIN_MODULE, ProcessLauncher
from blip3o_lit.config.errors import UserError, one_of, positive

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

PRUNERS = ("median", "none")


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

    def __init__(self, params: DictConfig, **options: Any) -> None:
        """Take the options of `hydra.sweeper`."""
        self.params, self.options = params, OptunaSweeperConf(**options)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra knows, and the launcher."""
        one_of("hydra.sweeper.pruner", self.options.pruner, PRUNERS)
        positive("hydra.sweeper.n_trials", self.options.n_trials)
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
        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        overrides = OverridesParser.create(self._context.config_loader).parse_overrides(words)
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
            self._config.hydra.sweeper.study = self.options.study or f"optuna-{definition[:8]}"
        folder = Path(str(self._config.hydra.sweep.dir)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self._config, folder / "multirun.yaml")
        with (folder / "study.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder}: another sweep is at work on this study") from None
            study = self._open(folder, definition)
            ranges = {key: distribution(item) for key, item in space.items()}
            while trials := self._next_batch(study, ranges):
                self._run_batch(study, trials, fixed, list(ranges))
        _print_end(study)

    def _definition(self, space: dict[str, Override], fixed: list[str]) -> str:
        """Return a hash of all that decides the trials, but for their number."""
        own = self.options
        facts = [sorted(str(item.input_line) for item in space.values()), sorted(fixed), own.seed]
        facts += [own.startup_trials, own.pruner, own.pruner_startup_trials]
        return hashlib.sha256(json.dumps([*facts, own.pruner_warmup_steps]).encode()).hexdigest()

    def _open(self, folder: Path, definition: str) -> optuna.Study:
        """Open or begin the study of a folder, which this process has locked."""
        import optuna
        from optuna.storages.journal import JournalFileBackend, JournalStorage

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        file, own = folder / "study.jsonl", self.options
        # What a killed process or a power cut left: Optuna's lock of the file, half of a line.
        file.with_name("study.jsonl.lock").unlink(missing_ok=True)
        content = file.read_bytes() if file.is_file() else b""
        if not content.endswith(b"\n") and content:
            os.truncate(file, content.rfind(b"\n") + 1)
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if own.pruner == "median":
            pruner = optuna.pruners.MedianPruner(own.pruner_startup_trials, own.pruner_warmup_steps)
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(file))),
            study_name="sweep",
            direction="maximize",
            load_if_exists=True,
            pruner=pruner,
        )
        if study.user_attrs.get("definition", definition) != definition:
            raise UserError(f"{folder} holds a study of another search: choose another folder")
        study.set_user_attr("definition", definition)
        study.set_user_attr("batch", study.user_attrs.get("batch", self.runner.n_jobs))
        if study.trials:
            print(f"the study in {folder} goes on: {len(study.trials)} trials so far", flush=True)
        return study

    def _next_batch(
        self, study: optuna.Study, space: dict[str, BaseDistribution]
    ) -> list[optuna.Trial]:
        """Return the trials to run next, all their parameters drawn; none at the study's end."""
        from optuna.trial import Trial

        trials, size = study.get_trials(deepcopy=False), study.user_attrs["batch"]
        unfinished = [trial for trial in trials if not trial.state.is_finished()]
        first = unfinished[0].number if unfinished else len(trials)
        last = min((first // size + 1) * size, self.options.n_trials)
        if first >= self.options.n_trials:
            return []
        batch = [Trial(study, trial._trial_id) for trial in unfinished]
        batch += [study.ask() for _ in range(len(trials), last)]
        for trial in batch:
            for key, within in space.items():
                draw(trial, key, within, self.options)
        return batch

    def _run_batch(
        self, study: optuna.Study, trials: list[optuna.Trial], fixed: list[str], keys: list[str]
    ) -> None:
        """Run the jobs of a batch, stop those that are pruned, then tell all results."""
        by_number = {trial.number: trial for trial in trials}
        jobs = []
        for number, trial in by_number.items():
            drawn = [f"{key}={trial.params[key]}" for key in keys]
            jobs.append(self.runner.prepare([*fixed, *drawn], number))
        pruned: set[int] = set()

        def prune(job: Job) -> bool:
            if job.number in pruned or not follow(study, by_number[job.number], job):
                return False
            pruned.add(job.number)
            return True

        self.runner.run(jobs, prune)
        for job in jobs:
            prune(job)
            tell(study, by_number[job.number], job, job.number in pruned)


def draw(
    trial: optuna.Trial, key: str, within: BaseDistribution, options: OptunaSweeperConf
) -> None:
    """Draw one parameter of a trial, unless an earlier process did.

    The value depends on the seed, the trial's number, the parameter's name and the finished trials,
    and not on how many values were drawn before by this process.
    """
    from optuna.samplers import TPESampler

    words = f"{options.seed} {trial.number} {key}".encode()
    seed = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
    # Drawn jointly, a parameter would depend on those drawn before it.
    trial.study.sampler = TPESampler(
        n_startup_trials=options.startup_trials, seed=seed, multivariate=False
    )
    trial._suggest(key, within)  # what suggest_float, _int and _categorical come down to


def distribution(override: Override) -> BaseDistribution:
    """Return Optuna's form of one of Hydra's sweeps: choice, range, interval, with a log tag.

    Raises:
        UserError: For any other sweep.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, ChoiceSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    if isinstance(value, RangeSweep):
        steps: list[Any] = list(value.range())
        kind = (
            IntDistribution if all(isinstance(step, int) for step in steps) else FloatDistribution
        )
        return kind(steps[0], steps[-1], step=value.step)  # type: ignore[arg-type]
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        log = "log" in value.tags
        if isinstance(value.start, int) and isinstance(value.end, int):
            return IntDistribution(value.start, value.end, log=log)
        return FloatDistribution(float(value.start), float(value.end), log=log)
    raise UserError(f"{override.input_line}: search by choice(), range() or interval()")


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

    value = job.objective
    interval = (job.result.get("best") or {}).get("cosine_ci95")
    if interval:
        trial.set_user_attr("cosine_ci95", interval)
    if job.state == "failed" or (value is None and not pruned):
        trial.set_user_attr("error", job.error or "no finite held-out cosine")
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, None if pruned else value, TrialState.PRUNED if pruned else None)


def _print_end(study: optuna.Study) -> None:
    """Print how the trials ended, and the best."""
    states = [trial.state.name.lower() for trial in study.trials]
    counts = ", ".join(f"{states.count(name)} {name}" for name in sorted(set(states)))
    print(f"{len(states)} trials: {counts}")
    if "complete" in states:
        best = study.best_trial
        settings = " ".join(f"{key}={value}" for key, value in best.params.items())
        ends = best.user_attrs.get("cosine_ci95")
        interval = f" (95 %: {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
        print(f"best: cosine {best.value:.4f}{interval} by trial {best.number}: {settings}")
