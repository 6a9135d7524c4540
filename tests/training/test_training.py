"""Whole training runs on the linear-Gaussian testbed: resume, stop, files, refusals, equality."""

from __future__ import annotations

import gc
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_run import config, differences, state

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    PrecisionConfig,
    TrainerConfig,
)
from blip3o_lit.training.run import run_training


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """An undisturbed run."""
    os.environ["BLIP3O_HOME"] = str(shared_home)
    folder = tmp_path_factory.mktemp("straight")
    run_training(config(), folder, ["seed=7"])
    return folder


def test_run_directory_holds_the_contracted_files(straight: Path) -> None:
    names = {path.name for path in straight.iterdir()}
    assert {"config.yaml", "overrides.txt", "environment.json", "metrics.csv"} <= names
    assert {"result.json", "checkpoints"} <= names
    files = {path.name for path in (straight / "checkpoints").iterdir()}
    steps = {f"step-{step:08d}.ckpt" for step in (2, 4, 6, 8, 10, 12)}
    assert files == steps | {"best.ckpt", "last.ckpt"}
    result = json.loads((straight / "result.json").read_text())
    assert result["finished"]
    assert result["step"] == 12
    assert result["best"]["cosine"] == pytest.approx(result["best"]["cosine"])
    rows = read_rows(straight / "metrics.csv")
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(1, 13))
    assert [int(row["step"]) for row in rows if row["val/cosine"]] == [4, 8, 12]


@pytest.mark.parametrize("step", [2, 4, 6])
def test_resumed_run_equals_the_straight_one_bit_for_bit(
    straight: Path, tmp_path: Path, step: int
) -> None:
    half = straight / "checkpoints" / f"step-{step:08d}.ckpt"
    run_training(config(resume=str(half)), tmp_path, [])
    for name in ("step-00000012.ckpt", "last.ckpt", "best.ckpt"):
        a, b = (state(folder / "checkpoints" / name) for folder in (straight, tmp_path))
        assert not differences(a, b)
    then, now = (read_rows(folder / "metrics.csv") for folder in (straight, tmp_path))
    assert [row["train/loss"] for row in now] == [row["train/loss"] for row in then]


def test_accumulated_run_takes_the_same_steps(straight: Path, tmp_path: Path) -> None:
    run_training(config(micro_batch_size=4), tmp_path, [])
    a, b = (read_rows(folder / "metrics.csv") for folder in (straight, tmp_path))
    losses = [[float(row["train/loss"]) for row in rows if row["train/loss"]] for rows in (a, b)]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=0)


def test_resume_with_another_micro_batch_goes_on_with_the_same_samples(
    straight: Path, tmp_path: Path
) -> None:
    half = straight / "checkpoints" / "step-00000006.ckpt"
    run_training(config(resume=str(half), micro_batch_size=8), tmp_path, [])
    then, now = (state(folder / "checkpoints" / "last.ckpt") for folder in (straight, tmp_path))
    assert then["global_step"] == now["global_step"] == 12
    for key, value in then["state_dict"].items():
        torch.testing.assert_close(value, now["state_dict"][key], rtol=1e-4, atol=1e-5)


def test_signal_saves_the_step_and_auto_goes_on_bit_equal(straight: Path, tmp_path: Path) -> None:
    marker = tmp_path / "metrics.csv"

    def interrupt() -> None:
        while not marker.exists() or len(read_rows(marker)) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        run_training(config(), tmp_path, [])
    thread.join()
    assert stopped.value.code == 75
    assert not json.loads((tmp_path / "result.json").read_text())["finished"]
    run_training(config(resume="auto"), tmp_path, [])
    a, b = (state(folder / "checkpoints" / "last.ckpt") for folder in (straight, tmp_path))
    assert not differences(a["state_dict"], b["state_dict"])
    assert not differences(a["optimizer_states"], b["optimizer_states"])


def test_auto_passes_over_a_damaged_checkpoint(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for step in (2, 4):
        source = straight / "checkpoints" / f"step-{step:08d}.ckpt"
        content = bytearray(source.read_bytes())
        if step == 4:  # More bytes than the padding between two records has.
            half = slice(len(content) // 2, len(content) // 2 + 128)
            content[half] = bytes(byte ^ 0xFF for byte in content[half])
        (folder / source.name).write_bytes(content)
        time.sleep(0.01)
    run_training(config(resume="auto", dry_run=True), tmp_path, [])
    said = " ".join(capsys.readouterr().out.split())
    assert "damaged checkpoint" in said
    assert "goes on from" in said
    assert "step-00000002.ckpt" in said


def test_early_stopping_ends_a_run_that_no_longer_improves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    still = OptimizerConfig(lr=1e-12)
    few = EvaluationConfig(every=2, images=8, patience=2)
    run_training(config(optimizer=still, evaluation=few), tmp_path, [])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["finished"]
    assert result["step"] == 6  # the first validation, and two that are no better
    assert "stopped early at step 6 of 12" in capsys.readouterr().out
    assert (tmp_path / "checkpoints" / "best.ckpt").is_file()
    history = json.loads((tmp_path / "history.json").read_text())
    assert [value is not None for value in history["val/cosine"]] == [False, True] * 3


@pytest.mark.parametrize("asked", ["cosine", "timed_loss"])
def test_the_best_step_is_the_one_that_its_score_says(
    straight: Path, tmp_path: Path, asked: str
) -> None:
    """Where the rate is far too high, the two scores name different steps."""
    wild = OptimizerConfig(lr=0.5, warmup_steps=1)
    scored = EvaluationConfig(every=2, images=8, best_by=asked)
    run_training(config(optimizer=wild, evaluation=scored), tmp_path, [])
    rows = [row for row in read_rows(tmp_path / "metrics.csv") if row["val/cosine"]]
    by = {
        "cosine": max(rows, key=lambda row: float(row["val/cosine"])),
        "timed_loss": min(rows, key=lambda row: float(row["val/timed_loss"])),
    }
    assert by["cosine"]["step"] != by["timed_loss"]["step"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best"]["step"] == int(by[asked]["step"])
    cosine = pytest.approx(float(by[asked]["val/cosine"]), abs=1e-6)
    assert result["best"]["cosine"] == cosine
    best = checkpointing.about(tmp_path / "checkpoints" / "best.ckpt")
    assert best["step"] == int(by[asked]["step"])


def test_a_run_that_goes_on_by_another_score_starts_its_best_anew(
    straight: Path, tmp_path: Path
) -> None:
    half = str(straight / "checkpoints" / "step-00000008.ckpt")
    scored = EvaluationConfig(every=4, images=8, best_by="timed_loss")
    run_training(config(resume=half, evaluation=scored), tmp_path, [])
    assert json.loads((tmp_path / "result.json").read_text())["best"]["step"] == 12


def test_a_best_by_a_loss_that_is_not_taken_is_refused() -> None:
    with pytest.raises(UserError, match=r"best_by=timed_loss needs losses"):
        EvaluationConfig(best_by="timed_loss", loss_times=0)


def test_resume_into_another_network_is_refused(straight: Path, tmp_path: Path) -> None:
    last = straight / "checkpoints" / "last.ckpt"
    other = ModelConfig(width=24, depth=2, heads=2, kv_heads=1, mlp_width=16)
    with pytest.raises(UserError, match=r"model.width was 16 there and is 24"):
        run_training(config(resume=str(last), model=other), tmp_path, [])
    with pytest.raises(UserError, match="no such checkpoint"):
        run_training(config(resume=str(tmp_path / "x.ckpt")), tmp_path, [])


def test_dry_run_takes_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_training(config(dry_run=True), tmp_path, []) is None
    assert not (tmp_path / "checkpoints").exists()
    assert "parameters" in capsys.readouterr().out


def test_ema_is_the_average_of_the_weights_by_its_formula(straight: Path, tmp_path: Path) -> None:
    every = CheckpointConfig(every=1, keep=-1)
    run_training(config(checkpoint=every), tmp_path, [])
    average = None
    for step in range(1, 13):
        weights = checkpointing.load(tmp_path / "checkpoints" / f"step-{step:08d}.ckpt")[
            "state_dict"
        ]
        name = "network.output.weight"
        decay = min(0.999, (1 + step) / (10 + step))
        before = torch.zeros_like(weights[name]) if average is None else average
        average = before + (1 - decay) * (weights[name] - before)
        torch.testing.assert_close(weights["ema.output.weight"], average, rtol=1e-5, atol=1e-7)


def test_training_learns_the_posterior_mean_direction(straight: Path) -> None:
    rows = [row for row in read_rows(straight / "metrics.csv") if row["train/loss"]]
    assert float(rows[-1]["train/loss"]) < float(rows[0]["train/loss"])


def test_a_term_of_the_loss_is_logged_beside_the_metric_of_its_name(straight: Path) -> None:
    rows = [row for row in read_rows(straight / "metrics.csv") if row["train/loss"]]
    for row in rows:
        cosine, term = float(row["train/cosine"]), float(row["train/cosine_loss"])
        assert cosine + term == pytest.approx(1, abs=1e-4)
        assert cosine != pytest.approx(0.5, abs=1e-3)


def test_impossible_hardware_is_refused(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        gpu = TrainerConfig(max_steps=1, accelerator="gpu")
        with pytest.raises(UserError, match="no CUDA GPU"):
            run_training(config(trainer=gpu), tmp_path, [])
        with pytest.raises(UserError, match="precision=fp16 needs a CUDA GPU"):
            run_training(config(precision=PrecisionConfig("fp16")), tmp_path, [])
    with pytest.raises(UserError, match="batch_size=16"):
        run_training(config(micro_batch_size=5), tmp_path, [])


def test_keep_prunes_old_step_files(tmp_path: Path) -> None:
    run_training(config(checkpoint=CheckpointConfig(every=2, keep=1)), tmp_path, [])
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("*"))
    assert names == ["best.ckpt", "last.ckpt", "step-00000012.ckpt"]


def test_steps_are_traced_by_number_and_deterministically(tmp_path: Path) -> None:
    traced = config()
    traced.trainer = replace(traced.trainer, max_steps=4, profile=[2, 3], deterministic=True)
    try:
        run_training(traced, tmp_path / "run", [])
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    trace = json.loads((tmp_path / "run" / "profile" / "steps-2-3.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum("Optimizer.step" in name for name in names) == 2
    assert gc.isenabled()
