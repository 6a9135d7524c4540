"""Sweeps that survive: failing jobs, killed sweeps, the same trials after all, several devices."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from conftest import ROOT
from optuna.distributions import FloatDistribution
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import Trial

from blip3o_lit.cli.sweeps.study import draw
from blip3o_lit.cli.sweeps.sweeper import OptunaSweeperConf

HERE = ROOT / "tests"
TRIVIAL = f"hydra.launcher.command=[{sys.executable},{HERE / 'trivial_job.py'}]"
SEARCH = [
    *("-m", "hparams_search=optuna", TRIVIAL, "hydra.launcher.n_jobs=2"),
    *("optimizer.lr=tag(log,interval(1e-5,1e-1))", "optimizer.weight_decay=0.01"),
    *("hydra.sweeper.startup_trials=4", "hydra.sweeper.pruner_startup_trials=3"),
]


def begin(*words: str, cwd: Path, seconds: float = 0.0) -> subprocess.Popen[str]:
    """Start the train command with a sweep, its output in a file."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRIVIAL_SECONDS": str(seconds)}
    command = [sys.executable, "-m", "blip3o_lit.train", *words]
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def sweep(*words: str, cwd: Path) -> tuple[int, str, str]:
    process = begin(*words, cwd=cwd)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


def trials(folder: Path) -> list[tuple[str, dict[str, object], float | None]]:
    """Return state, parameters and value of every trial of a study."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.jsonl")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    return [(trial.state.name, trial.params, trial.value) for trial in study.trials]


def kill_when(process: subprocess.Popen[str], folder: Path, jobs: int) -> None:
    """Kill a sweep, and not its jobs, as soon as so many of its jobs have been started."""
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*/job.json"))) < jobs:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_parameter_does_not_depend_on_which_others_this_process_drew() -> None:
    """A sweep may be killed between two parameters of a trial."""
    range_ = FloatDistribution(0.0, 1.0)

    def draws(interrupted: bool) -> dict[str, float]:
        study = optuna.create_study(direction="maximize")
        for number in range(12):
            params = {"a": number / 12, "b": (5 * number % 12) / 12}
            ranges = dict.fromkeys(params, range_)
            value = params["a"] - params["b"]
            study.add_trial(optuna.create_trial(params=params, distributions=ranges, value=value))
        trial = study.ask()
        draw(trial, "a", range_, OptunaSweeperConf())
        if interrupted:
            trial = Trial(study, trial._trial_id)
        draw(trial, "b", range_, OptunaSweeperConf())
        return trial.params

    assert draws(interrupted=True) == draws(interrupted=False)


@pytest.mark.parametrize("count", [12, pytest.param(24, marks=pytest.mark.soak)])
def test_killed_study_has_the_trials_of_an_undisturbed_one(tmp_path: Path, count: int) -> None:
    words = [*SEARCH, f"hydra.sweeper.n_trials={count}"]
    code, said, err = sweep(*words, "hydra.sweep.dir=straight", cwd=tmp_path)
    assert code == 1, f"failed trials show in the exit code: {err}"
    straight = trials(tmp_path / "straight")
    assert len(straight) == count
    states = [state for state, _, _ in straight]
    assert [number for number, state in enumerate(states) if state == "FAIL"] == [2, 5, 8]
    assert {"COMPLETE", "PRUNED"} < set(states)
    assert "2: RuntimeError: planned crash" in said
    assert "8: killed by SIGKILL" in said
    killed = tmp_path / "killed"
    for jobs in (4, count // 2 + 1):
        first = begin(*words, "hydra.sweep.dir=killed", cwd=tmp_path, seconds=0.1)
        kill_when(first, killed, jobs)
        with (killed / "study.jsonl").open("a") as journal:
            journal.write('{"op_code":4,"wor')  # what a power cut leaves of a line
        (killed / "study.jsonl.lock").unlink(missing_ok=True)
        (killed / "study.jsonl.lock").symlink_to(killed / "study.jsonl")  # Optuna's own lock
    code, said, err = sweep(*words, "hydra.sweep.dir=killed", cwd=tmp_path)
    assert code == 1, err
    assert "goes on: " in said
    assert trials(killed) == straight
    for number, (state, _, _) in enumerate(straight):
        if state == "COMPLETE":
            starts = (killed / str(number) / "starts.txt").read_text()
            assert starts == "start\n", "a job that outlived its sweep is not run twice"
    rows = list(csv.DictReader((killed / "sweep.csv").open()))
    assert len(rows) == count
    assert sum(row["ended"].startswith("failed") for row in rows) == 2
    assert (killed / "sweep.html").stat().st_size > 500_000
