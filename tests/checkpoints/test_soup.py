"""The mean of runs that began with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quick_run import config
from safetensors.torch import load_file

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.trainer import CheckpointConfig, TrainerConfig
from blip3o_lit.export import ExportConfig, export
from blip3o_lit.training.run import run_training

QUICK: dict[str, Any] = {
    "trainer": TrainerConfig(max_steps=4, log_every=4, accelerator="cpu"),
    "checkpoint": CheckpointConfig(every=2, keep=-1),
}


def run(folder: Path, **changes: Any) -> Path:
    run_training(config(**QUICK | changes), folder, [])
    return folder


def weights(source: Path) -> dict[str, torch.Tensor]:
    return load(source, as_stored=True).translator.state_dict()


def soup(out: Path, *runs: Path) -> dict[str, torch.Tensor]:
    export(ExportConfig(soup=[str(one) for one in runs], out=str(out)))
    return load_file(out / "model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one seed and other learning rates, and one that goes on from each of them."""
    folder = tmp_path_factory.mktemp("soup")
    run(folder / "a")
    run(folder / "b", optimizer=OptimizerConfig(lr=5e-3))
    for name in ("a", "b"):
        run(folder / f"from-{name}", init_from=str(folder / "a"), seed=ord(name))
    return folder


def test_of_a_run_with_itself_it_is_that_run(runs: Path, tmp_path: Path) -> None:
    own, mixed = weights(runs / "a"), soup(tmp_path / "out", *[runs / "a"] * 3)
    assert own.keys() == mixed.keys()
    assert all(torch.equal(own[name], mixed[name]) for name in own)


def test_of_two_runs_it_is_their_mean_and_an_export_like_any(runs: Path, tmp_path: Path) -> None:
    a, b = weights(runs / "a"), weights(runs / "b")
    mixed = soup(tmp_path / "out", runs / "a", runs / "b")
    assert any(not torch.equal(a[name], b[name]) for name in a)
    for name, tensor in mixed.items():
        assert torch.equal(tensor, ((a[name].double() + b[name].double()) / 2).float()), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert "mean of a (4 steps), b (4 steps)" in card
    run(tmp_path / "next", init_from=str(tmp_path / "out"))
    assert load(tmp_path / "out").facts["soup"][1]["name"] == "b"


def test_runs_from_the_same_weights_are_averaged_whatever_their_seed(
    runs: Path, tmp_path: Path
) -> None:
    soup(tmp_path / "out", runs / "from-a", runs / "from-b")
    stored = checkpointing.about(runs / "from-a" / "checkpoints" / "last.ckpt")["start"]
    assert stored.startswith("the weights ")
    half = str(runs / "from-a" / "checkpoints" / "step-00000002.ckpt")
    run(tmp_path / "resumed", resume=half, init_from=None, seed=ord("a"))
    again = checkpointing.about(tmp_path / "resumed" / "checkpoints" / "last.ckpt")
    assert again["start"] == stored, "a resumed run keeps its start"


def test_runs_that_differ_are_refused_by_what_differs(runs: Path, tmp_path: Path) -> None:
    other = run(tmp_path / "seed", seed=8)
    narrow = ModelConfig(width=16, depth=1, heads=2, kv_heads=1, mlp_width=16)
    small = run(tmp_path / "small", model=narrow)
    few = config()
    few.data.subset = 40
    fewer = run(tmp_path / "few", data=few.data)
    for second, said in (
        (other, r"differ in their start \(the seed 8, and the seed 7\): average runs with one"),
        (runs / "from-a", r"differ in their start \(the weights .*, and the seed 7\)"),
        (small, r"differ in network.blocks.1"),
        (fewer, r"differ in condition_standardizer\."),
    ):
        with pytest.raises(UserError, match=said):
            soup(tmp_path / "out", runs / "a", second)
    with pytest.raises(UserError, match="give the model that it has"):
        run(tmp_path / "refused", model=narrow, init_from=str(runs / "a"))
    assert not list((tmp_path / "refused").iterdir()), "a refused start leaves no run behind"
    with pytest.raises(UserError, match="is one run: name two or more"):
        ExportConfig(soup=["a"], out="x")
    with pytest.raises(UserError, match="takes the place of ckpt= and ema="):
        ExportConfig(ckpt="a", soup=["a", "b"], out="x")
