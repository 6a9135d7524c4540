"""A gradient that is not finite changes nothing, is named, and does not go on for ever."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from made_run import small_config

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.trainer import EvaluationConfig, TrainerConfig
from blip3o_lit.training.run import run_training


def train(
    folder: Path, monkeypatch: pytest.MonkeyPatch, bad: set[int], steps: int, limit: int = 10
) -> dict:
    """Train with gradients that are poisoned at some steps; returns the last checkpoint."""
    monkeypatch.setenv("BLIP3O_HOME", str(folder / "home"))
    config = small_config()
    config.trainer = TrainerConfig(
        max_steps=steps, accelerator="cpu", log_every=3, max_bad_steps=limit
    )
    config.optimizer.ema_decay = 0.0  # the average is the last weights
    config.evaluation = EvaluationConfig(every=1000, images=4)
    config.logger.tensorboard = False

    config.callbacks = {"poison": {"_target_": "poison.Poison", "steps": sorted(bad)}}
    run_training(config, folder / "run", [])
    return torch.load(folder / "run" / "checkpoints" / "last.ckpt", weights_only=True)


def test_a_bad_step_changes_neither_weights_nor_moments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # With the last step poisoned, everything but the schedule is that of the run without it.
    short = train(tmp_path / "short", monkeypatch, bad=set(), steps=1)
    assert "was skipped" not in capfd.readouterr().out
    poisoned = train(tmp_path / "poisoned", monkeypatch, bad={2}, steps=2)
    said = capfd.readouterr().out
    assert "warning: step 2 was skipped: its gradient is not finite; samples " in said
    for key, weight in short["state_dict"].items():
        if key.startswith(("network.", "ema.")):
            assert torch.equal(poisoned["state_dict"][key], weight), key
    states = [c["optimizer_states"][0]["state"] for c in (short, poisoned)]
    for number, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(states[1][number][name], value)
    assert poisoned["global_step"] == 2


def test_training_goes_on_after_a_bad_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = train(tmp_path, monkeypatch, bad={2, 5}, steps=7)
    assert all(bool(torch.isfinite(w).all()) for w in found["state_dict"].values())
    counts = {float(s["step"]) for s in found["optimizer_states"][0]["state"].values()}
    assert counts == {5.0}
    rows = (tmp_path / "run" / "metrics.csv").read_text()
    assert "nan" not in rows


def test_bad_steps_in_a_row_stop_the_run_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        UserError,
        match=r"3 steps in a row up to step 7 .* samples [0-9]+, .* \(in step 9 first in network\.",
    ):
        train(tmp_path, monkeypatch, bad={2, 5, 6, 7, 8, 9}, steps=20, limit=3)
