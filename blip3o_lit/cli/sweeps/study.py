"""An Optuna study over the jobs of a sweep, which survives its own end.

Trials are asked for in batches: all parameters of a batch are in `study.jsonl` before its first job
starts, and all results are told when its last job has ended. So what a trial sees is a function of
the seed and of the earlier batches alone, and a study that was killed and goes on has the trials of
one that was not.
"""

import csv
import hashlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.pruners import MedianPruner, NopPruner
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import Trial, TrialState

from blip3o_lit.cli.sweeps.jobs import Job
from blip3o_lit.cli.sweeps.launcher import ProcessLauncher
from blip3o_lit.cli.sweeps.sweeper import OptunaSweeperConf
from blip3o_lit.config.errors import UserError


def run_study(
    folder: Path,
    definition: str,
    space: dict[str, Override],
    fixed: list[str],
    options: OptunaSweeperConf,
    launcher: ProcessLauncher,
) -> None:
    """Run the study of a folder, which this process holds, to its last trial.

    `definition` is a hash of all that decides the trials, but for their number.
    """
    ranges = {key: distribution(item) for key, item in space.items()}
    study = open_study(folder, options)
    if study.user_attrs.get("definition", definition) != definition:
        raise UserError(f"{folder} holds a study of another search: choose another folder")
    study.set_user_attr("definition", definition)
    study.set_user_attr("batch", study.user_attrs.get("batch", launcher.n_jobs))
    if study.trials:
        print(f"the study in {folder} goes on: {len(study.trials)} trials so far", flush=True)
    while batch := next_batch(study, options.n_trials):
        for trial in batch.values():
            for key, values in ranges.items():
                draw(trial, key, values, options)
        jobs = []
        for number, trial in batch.items():
            drawn = [f"{key}={trial.params[key]}" for key in ranges]
            jobs.append(launcher.prepare([*fixed, *drawn], number))
        launcher.run(jobs, lambda job: is_pruned(study, batch[job.number], job))
        for job in jobs:
            tell(study, batch[job.number], job)
    print_end(study)


def open_study(folder: Path, options: OptunaSweeperConf) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / "study.jsonl"
    # What a killed process or a power cut left: Optuna's lock of the file, half of a line.
    file.with_name("study.jsonl.lock").unlink(missing_ok=True)
    content = file.read_bytes() if file.is_file() else b""
    if content and not content.endswith(b"\n"):
        os.truncate(file, content.rfind(b"\n") + 1)
    median = MedianPruner(options.pruner_startup_trials, options.pruner_warmup_steps)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(file))),
        study_name="sweep",
        direction="maximize",
        load_if_exists=True,
        pruner=median if options.pruner == "median" else NopPruner(),
    )


def next_batch(study: optuna.Study, n_trials: int) -> dict[int, Trial]:
    """Return the trials to run next, by number; none at the study's end."""
    trials, size = study.get_trials(deepcopy=False), study.user_attrs["batch"]
    unfinished = [trial for trial in trials if not trial.state.is_finished()]
    first = unfinished[0].number if unfinished else len(trials)
    if first >= n_trials:
        return {}
    end = min((first // size + 1) * size, n_trials)
    batch = [Trial(study, trial._trial_id) for trial in unfinished]
    batch += [study.ask() for _ in range(len(trials), end)]
    return {trial.number: trial for trial in batch}


def draw(trial: Trial, key: str, values: BaseDistribution, options: OptunaSweeperConf) -> None:
    """Draw one parameter of a trial, unless an earlier process did.

    The value depends on the seed, the trial's number, the parameter's name and the finished trials,
    and not on how many values were drawn before by this process.
    """
    words = f"{options.seed} {trial.number} {key}".encode()
    seed = int.from_bytes(hashlib.sha256(words).digest()[:4], "little")
    # Drawn jointly, a parameter would depend on those drawn before it.
    trial.study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=options.startup_trials, seed=seed, multivariate=False
    )
    trial._suggest(key, values)  # what suggest_float, _int and _categorical come down to


def distribution(override: Override) -> BaseDistribution:
    """Return Optuna's form of one of Hydra's sweeps: choice, range, interval, with a log tag."""
    value = override.value()
    if isinstance(value, ChoiceSweep):
        return CategoricalDistribution(list(override.sweep_string_iterator()))
    log, step = False, None
    if isinstance(value, RangeSweep):
        numbers = list(value.range())
        low, high, step = numbers[0], numbers[-1], value.step
    elif isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        low, high, log = value.start, value.end, "log" in value.tags
    else:
        raise UserError(f"{override.input_line}: search by choice(), range() or interval()")
    if isinstance(low, int) and isinstance(high, int):
        return IntDistribution(low, high, log, int(step or 1))
    return FloatDistribution(float(low), float(high), log, step)


def is_pruned(study: optuna.Study, trial: Trial, job: Job) -> bool:
    """Report a job's new validations, up to one at which the trial is to be stopped."""
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


def tell(study: optuna.Study, trial: Trial, job: Job) -> None:
    """Tell the study what became of a trial: its cosine, pruned, or failed with the reason."""
    pruned = is_pruned(study, trial, job)
    interval = (job.result.get("best") or {}).get("cosine_ci95")
    if interval:
        trial.set_user_attr("cosine_ci95", interval)
    if job.state == "failed" or (job.objective is None and not pruned):
        trial.set_user_attr("error", job.error or "no finite held-out cosine")
        study.tell(trial, state=TrialState.FAIL)
    elif pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, job.objective)


def print_end(study: optuna.Study) -> None:
    states = [trial.state.name.lower() for trial in study.trials]
    counts = ", ".join(f"{states.count(name)} {name}" for name in sorted(set(states)))
    print(f"{len(states)} trials: {counts}")
    if "complete" in states:
        best = study.best_trial
        settings = " ".join(f"{key}={value}" for key, value in best.params.items())
        ends = best.user_attrs.get("cosine_ci95")
        interval = f" (95 %: {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
        print(f"best: cosine {best.value:.4f}{interval} by trial {best.number}: {settings}")
