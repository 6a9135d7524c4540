"""Runs that train a map: resumed, begun from another run, scored, exported; what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quick_run import config, differences, state

from blip3o_lit import BLIP3oInference
from blip3o_lit.budget.machine import this_machine
from blip3o_lit.budget.plan import make_plan
from blip3o_lit.checkpoints.initial import initial_weights
from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.commands import ExportConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import TrainerConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.export import export
from blip3o_lit.training.module import TranslationModule
from blip3o_lit.training.run import open_data, run_training
from blip3o_lit.training.trainer import machine_of

PAIRS = FlowConfig(pairs=0.5)


def module_of(config: TrainConfig) -> TranslationModule:
    """A run's module before its first step."""
    data, steps = open_data(config)
    plan = make_plan(config, data, steps, machine_of(config, this_machine("cpu")))
    return TranslationModule(plan, data, initial_weights(config, data.shape))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """A `plain` run, `maps` that begins from it, and `cross`, which trains maps from the start."""
    os.environ["BLIP3O_HOME"] = str(shared_home)
    root = tmp_path_factory.mktemp("maps")
    few = TrainerConfig(max_steps=4, log_every=1, accelerator="cpu")
    run_training(config(trainer=few), root / "plain", [])
    run_training(config(flow=PAIRS, init_from=str(root / "plain")), root / "maps", [])
    cross = replace(config().model, conditioning="cross", time_scale=10.0)
    run_training(config(flow=PAIRS, model=cross, trainer=few), root / "cross", [])
    return root


def test_a_run_of_pairs_is_resumed_bit_for_bit(runs: Path, tmp_path: Path) -> None:
    half = runs / "maps" / "checkpoints" / "step-00000006.ckpt"
    # Where a checkpoint is resumed the other run is not looked for.
    run_training(config(flow=PAIRS, resume=str(half)), tmp_path, [])
    a, b = (state(folder / "checkpoints" / "last.ckpt") for folder in (runs / "maps", tmp_path))
    assert not differences(a, b)


def test_the_first_step_is_from_the_other_runs_outputs(runs: Path) -> None:
    own = module_of(config(flow=PAIRS, init_from=str(runs / "plain"), seed=8)).translator
    other = load(runs / "plain")
    condition_BMC = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(0))
    for solver in (other.config.solver, replace(other.config.solver, name="heun", steps=3)):
        one, two = (
            translator.generate(condition_BMC, torch.arange(3), 0, solver).x1_BND
            for translator in (own, other.translator)
        )
        assert torch.equal(one, two)


def test_statistics_are_kept_or_taken_anew(runs: Path) -> None:
    stored = load(runs / "plain").translator.target_standardizer.mean_NC
    data = replace(config().data, subset=20)
    for word, same in (("kept", True), ("new", False)):
        settings = config(init_from=str(runs / "plain"), init_statistics=word, data=data)
        assert torch.equal(module_of(settings).target_standardizer.mean_NC, stored) is same


def test_parts_that_do_not_fit_are_named_or_left(runs: Path) -> None:
    wide = replace(config().model, mlp_width=24)
    settings = config(model=wide, init_from=str(runs / "plain"))
    with pytest.raises(UserError, match=r"mlp.layer.down.weight is \[16, 16\] there and \[16, 24"):
        module_of(settings)
    module = module_of(replace(settings, init_strict=False))
    fresh = module_of(replace(settings, init_from=None))
    stored = load(runs / "plain").translator.network.state_dict()
    for name, tensor in module.network.state_dict().items():
        source = fresh.network.state_dict() if ".mlp." in name else stored
        assert torch.equal(tensor, source[name]), name
    with pytest.raises(UserError, match="span.first.weight is not known here"):
        module_of(config(init_from=str(runs / "maps")))
    with pytest.raises(UserError, match="init_from=a begins a run, resume=b goes on with one"):
        config(init_from="a", resume="b")
    slow = replace(config().model, time_scale=10.0)
    settings = config(model=slow, init_from=str(runs / "plain"))
    initial = initial_weights(settings, load(runs / "plain").shape)
    assert initial is not None
    assert initial.changed == ["model.time_scale was 1000.0 there and is 10.0 here"]


@pytest.mark.parametrize("name", ["maps", "cross"])
def test_one_evaluation_is_scored_and_exported(runs: Path, tmp_path: Path, name: str) -> None:
    settings = {"baselines": "none", "curve": [], "samples": 0, "images": 16, "device": "cpu"}
    scores = evaluate(EvaluateConfig(str(runs / name), solvers=["map-1", "map"], **settings))
    assert scores["estimators"]["map-1"]["nfe"] == 1
    export(ExportConfig(str(runs / name), str(tmp_path / "export")))
    condition = torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(0))
    made = [
        BLIP3oInference(folder, "cpu").generate(condition, 1, solver="map")
        for folder in (runs / name, tmp_path / "export")
    ]
    assert torch.equal(*made)


def test_a_plain_run_has_no_map(runs: Path) -> None:
    with pytest.raises(UserError, match="solver=map needs a network that was trained with"):
        evaluate(EvaluateConfig(str(runs / "plain"), solvers=["map-1"], device="cpu"))
