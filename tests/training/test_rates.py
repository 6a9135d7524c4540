"""The peak learning rate: what `auto` stands for, and which one a resumed run has."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from quick_run import differences, state

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.cli.command import composed
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.train import main

SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.max_steps=4", "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=4", "evaluation.images=20", "checkpoint.every=2", "checkpoint.keep=-1"),
]
MIDDLE = Path("checkpoints/step-00000002.ckpt")


def documented() -> dict[str, float]:
    """Return the rates of docs/sweeps.md by preset."""
    page = (ROOT / "docs" / "sweeps.md").read_text("utf-8")
    rows = re.findall(r"^\| `model=(\w+)` \| \d+ \| ([\d.]+) \|$", page, re.M)
    return {preset: float(rate) for preset, rate in rows}


def train(monkeypatch: pytest.MonkeyPatch, folder: Path, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train", *SMALL, f"hydra.run.dir={folder}", *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def last(folder: Path) -> dict[str, Any]:
    return checkpointing.load(folder / "checkpoints" / "last.ckpt")


def rate_of(folder: Path, step: int) -> float:
    return float(read_rows(folder / "metrics.csv")[step - 1]["train/lr"])


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "conf/model").glob("*")))
def test_auto_is_the_documented_number_of_each_preset(preset: str) -> None:
    words = [f"model={preset}", "optimizer.lr=auto"]
    if preset == "nextdit":
        with pytest.raises(UserError, match="this is muon with nextdit: give a number"):
            composed("train", TrainConfig, words)
        return
    found = composed("train", TrainConfig, words).optimizer
    assert (found.lr, found.auto_lr) == ("auto", documented()[preset])
    assert found.peak == found.auto_lr


@pytest.mark.parametrize("word", ["1", "1e-2", "'1e-2'"])
def test_a_rate_is_a_number_however_it_is_written(word: str) -> None:
    found = composed("train", TrainConfig, [f"optimizer.lr={word}"]).optimizer
    assert found.peak == found.lr == float(word.strip("'"))
    assert found.auto_lr is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optimizer.lr=fast"], "optimizer.lr=fast: give a number above 0, or auto"),
        (["optimizer.lr=0"], "optimizer.lr=0: give a number above 0, or auto"),
        (["optimizer.lr=nan"], "optimizer.lr=nan: give a number above 0, or auto"),
        (
            ["optimizer.lr=auto", "optimizer=adamw", "model=nextdit"],
            "this is adamw with nextdit: give",
        ),
        (["optimizer.auto_lr=0.1"], "optimizer.lr is 0.001: give optimizer.lr alone"),
    ],
)
def test_what_is_no_rate_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        composed("train", TrainConfig, words)


def test_auto_is_trained_with_printed_kept_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where auto stood for another number when the run began, as in another version."""
    whole, again = tmp_path / "whole", tmp_path / "again"
    assert train(monkeypatch, whole, "optimizer.lr=auto", "optimizer.auto_lr=0.0077") == 0
    assert "0.0077 (optimizer.lr=auto: muon, 16 wide)" in capsys.readouterr().out
    saved = last(whole)["blip3o"]["config"]["optimizer"]
    assert (saved["lr"], saved["auto_lr"]) == ("auto", 0.0077)
    assert train(monkeypatch, again, "optimizer.lr=auto", f"resume={whole / MIDDLE}") == 0
    assert "resumed with optimizer" not in capsys.readouterr().out
    ends = [state(folder / "checkpoints" / "last.ckpt") for folder in (whole, again)]
    assert not differences(*ends)
    straight = tmp_path / "number"
    assert train(monkeypatch, straight, "optimizer.lr=0.0077") == 0
    weights = (last(folder)["state_dict"] for folder in (whole, straight))
    assert all(torch.equal(*pair) for pair in zip(*(one.values() for one in weights)))


def test_auto_does_not_go_on_with_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    assert train(monkeypatch, first) == 0
    assert train(monkeypatch, other, "optimizer.lr=auto", f"resume={first / MIDDLE}") == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.endswith(
        "optimizer.lr was 0.003 there and is auto here: give optimizer.lr=0.003, or start afresh"
    )


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_has_the_settings_that_it_says(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    optimizer: str,
) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    words = (f"optimizer={optimizer}", "optimizer.schedule=constant", "optimizer.warmup_steps=0")
    assert train(monkeypatch, first, *words) == 0
    new = ("optimizer.lr=0.006", "optimizer.weight_decay=0.5", "optimizer.beta2=0.5")
    assert train(monkeypatch, other, *words, *new, f"resume={first / MIDDLE}") == 0
    said = capsys.readouterr().out
    assert "resumed with optimizer.lr=0.006, was 0.003" in said
    assert [rate_of(other, step) for step in (1, 2, 3, 4)] == [0.003, 0.003, 0.006, 0.006]
    groups = last(other)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.5}
    assert all(group["betas"] == (0.9, 0.5) for group in groups)
