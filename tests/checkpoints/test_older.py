"""Files that version 0.1.0 wrote load, generate what it generated, and train on as it did.

`older/` holds them: a store and its int8 copy, step 4 of a run of 8 (one file, and FSDP2's folder
of two processes), an export of step 8, the rows that the whole run logged, and what that version
generated from a fixed condition.
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small_store import sample

from blip3o_lit import train
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

OLDER = ROOT / "tests" / "checkpoints" / "older"
EXPECTED = load_file(OLDER / "expected.safetensors")
RUN = [
    *("data=tokens", "mode=patch_only", "model=custom", "model.width=8", "model.depth=1"),
    *("model.heads=2", "model.kv_heads=1", "model.mlp_width=8", "precision=fp32", "logger=csv"),
    *("trainer.accelerator=cpu", "trainer.log_every=1", "trainer.max_steps=8", "batch_size=4"),
    *("optimizer.lr=1e-2", "optimizer.warmup_steps=1", "evaluation.every=4", "checkpoint.every=4"),
]
STEP = "checkpoints/step-00000004.ckpt"


@pytest.mark.parametrize(
    ("name", "path"),
    [("step-4", f"run/{STEP}"), ("sharded", f"sharded/{STEP}"), ("export", "export")],
)
def test_older_weights_generate_what_they_generated(name: str, path: str) -> None:
    model = BLIP3oInference(OLDER / path, "cpu")
    condition = EXPECTED["condition"]
    mean = model.generate(condition)
    heun = model.generate(condition, 2, solver="heun", seed=0)
    torch.testing.assert_close(torch.as_tensor(mean), EXPECTED[f"{name}/mean"], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.as_tensor(heun), EXPECTED[f"{name}/heun"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("store", "tolerance"), [("store", 0.0), ("int8", 0.02)])
def test_older_stores_hold_what_was_written(store: str, tolerance: float) -> None:
    opened = TokenStore.open(OLDER / store)
    sides = DataConfig().condition, DataConfig().target, ModeConfig("patch_only")
    reader = TokenReader(opened, "validation", *sides)
    tokens = reader.read(np.arange(4))["condition"].float()
    true = np.stack([sample(12 + number)["eva"][1:] for number in range(4)])
    error = (tokens - torch.from_numpy(true).float()).abs().amax((0, 1))
    assert len(reader) == 4
    assert (error <= tolerance * torch.from_numpy(true).float().abs().amax((0, 1))).all()


@pytest.mark.parametrize("kind", ["run", "sharded"])
def test_an_older_run_is_gone_on_with(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = shutil.copytree(OLDER / kind, tmp_path / "earlier") / STEP
    new = tmp_path / "new"
    words = [f"resume={checkpoint}", f"data.tokens={OLDER / 'store'}", f"hydra.run.dir={new}"]
    monkeypatch.setattr(sys, "argv", ["train", *RUN, *words])
    assert train.main() in (0, None)
    said = capsys.readouterr().out
    for then, now in (("model.positions=rope", "both"), ("optimizer.muon_layers=blocks", "tokens")):
        assert f"goes on with {then}, which it was begun with, not {now}" in said
    rows, before = (
        list(csv.DictReader(path.open()))
        for path in (new / "metrics.csv", OLDER / "run/metrics.csv")
    )
    assert [row["step"] for row in rows][-4:] == ["5", "6", "7", "8"]
    for row, old in zip(rows[-4:], before[-4:]):
        assert float(row["train/loss"]) == pytest.approx(float(old["train/loss"]), abs=2e-4)
