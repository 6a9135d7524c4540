"""Runs through the real command: sweeps, two processes, loggers."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blip3o_lit.checkpoints.metrics_csv import read_rows

SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.max_steps=6", "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=3", "evaluation.images=20"),
]


def launch(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run(
        [sys.executable, "-m", "blip3o_lit.train", *SMALL, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def losses(run_dir: Path) -> list[float]:
    rows = read_rows(run_dir / "metrics.csv")
    return [float(row["train/loss"]) for row in rows if row["train/loss"]]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """A sweep over two learning rates, started in a folder of its own."""
    os.environ["BLIP3O_HOME"] = str(shared_home)
    folder = tmp_path_factory.mktemp("sweep")
    done = launch("-m", "optimizer.lr=1e-4,3e-3", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower(), done.stderr
    return next((folder / "outputs" / "sweeps").iterdir())


def test_a_sweep_leaves_complete_runs(sweep: Path) -> None:
    for number, rate in enumerate(("0.0001", "0.003")):
        run = sweep / str(number)
        assert f"optimizer.lr={rate}" in (run / "overrides.txt").read_text()
        assert json.loads((run / "result.json").read_text())["finished"]
        assert (run / "checkpoints" / "best.ckpt").is_file()
    assert (sweep / "sweep.html").is_file()
    assert (sweep / "sweep.csv").is_file()
    assert losses(sweep / "0")[0] == losses(sweep / "1")[0]
    assert losses(sweep / "0")[-1] != losses(sweep / "1")[-1]


def test_two_processes_inside_a_sweep_train_as_one_does(sweep: Path, tmp_path: Path) -> None:
    words = ("strategy=ddp", "trainer.devices=2", "optimizer.lr=3e-3", "micro_batch_size=8,5")
    launcher = ("hydra/launcher=process", "hydra.sweep.dir=two")
    done = launch("-m", *launcher, *words, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "2 jobs: 1 done, 1 failed" in done.stdout
    assert "  1: micro_batch_size=5 does not divide" in done.stdout
    run = tmp_path / "two" / "0"
    assert "2 ranks train one config: " in (run / "train.log").read_text()
    assert {path.name for path in run.parent.iterdir() if path.is_dir()} == {"0", "1"}
    assert losses(run) == pytest.approx(losses(sweep / "1"), rel=1e-5)
    validation = [
        json.loads((folder / "result.json").read_text())["validation"]["cosine"]
        for folder in (run, sweep / "1")
    ]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    rows = list(csv.DictReader((run.parent / "sweep.csv").open()))
    assert [row["run"] for row in rows] == ["0", "1"]
    assert rows[1]["ended"].startswith("failed: micro_batch_size=5")


def test_several_devices_in_a_sweep_are_refused(tmp_path: Path) -> None:
    done = launch("-m", "seed=1,2", "trainer.devices=2", "strategy=ddp", cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra/launcher=process" in done.stderr
    assert "Traceback" not in done.stderr


def test_loggers_write_beside_metrics_csv(tmp_path: Path) -> None:
    done = launch("logger=[tensorboard,wandb]", "hydra.run.dir=run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert len(losses(run)) == 6
    assert list((run / "tensorboard").glob("events.out.*"))
    assert list((run / "wandb").glob("offline-run-*/*.wandb"))
