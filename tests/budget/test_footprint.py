"""The plan's bytes against what the allocator gives out; checkpointing; the plan command."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import config
from tracked import allocator_peak

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.activations import activations
from blip3o_lit.budget.states import rank_bytes, units
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.trainer import StrategyConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.models.precision import PRECISIONS, Precision
from blip3o_lit.training.ema import update_averages
from blip3o_lit.training.run import run_training

SHAPE = PairShape(TokenShape((8, 8), False, 96), TokenShape((8, 8), False, 64))
DIT = ModelConfig(width=96, depth=6, heads=4, kv_heads=2, mlp_width=256)
NEXTDIT = ModelConfig("nextdit", 96, 6, 4, 4, 256, conditioning="cross", key_rope=False)
SAVING = {"activation_checkpointing": True}


def train(model: ModelConfig, images: int, precision: Precision, name: str) -> None:
    """Two optimizer steps of two micro-batches each, as the trainer takes them."""
    network = build_network(model, SHAPE).to(precision.weights)
    low = precision.autocast
    average = copy.deepcopy(network).float().requires_grad_(False)
    objective = FlowObjective(FlowConfig())
    optimizer = make_optimizer(network, OptimizerConfig(name))
    for _ in range(2):
        for _ in range(2):
            raw_BMC = torch.randn(images, 64, 96).half()
            raw_BND = torch.randn(images, 64, 64).half()
            condition_BMC, x1_BND = raw_BMC.float(), raw_BND.float()
            z_BND, t_B = torch.randn_like(x1_BND), torch.rand(images)
            with torch.autocast("cpu", low, enabled=low is not None):
                loss = objective.loss(network, condition_BMC, x1_BND, z_BND, t_B).total
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_averages([average], network, [0.9])


@pytest.mark.parametrize(
    ("model", "precision", "optimizer"),
    [
        (DIT, "fp32", "muon"),
        (DIT, "bf16", "adamw"),
        (DIT, "bf16_true", "muon"),
        (NEXTDIT, "bf16", "muon"),
        (replace(DIT, **SAVING), "fp32", "adamw"),
        (replace(DIT, activation_budget=0.5), "bf16", "adamw"),
    ],
    ids=["fp32", "bf16", "bf16_true", "nextdit", "recomputed", "budget"],
)
def test_planned_bytes_are_those_of_the_allocator(
    model: ModelConfig, precision: str, optimizer: str
) -> None:
    images, formats = 16, PRECISIONS[precision]
    planned = rank_bytes("single", units(model, SHAPE), formats, OptimizerConfig(optimizer), 1)
    planned += activations(model, FlowConfig(), SHAPE, formats).of(images, "single")
    measured = allocator_peak(lambda: train(model, images, formats, optimizer))
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("model", [DIT, NEXTDIT], ids=["dit", "nextdit"])
def test_checkpointing_halves_the_saved_activations(model: ModelConfig) -> None:
    """Tensors saved for backward, and the blocks' inputs, which a checkpoint keeps itself."""

    def saved(model: ModelConfig) -> int:
        network, storages = build_network(model, SHAPE), {}
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage
            return tensor

        for block in network.blocks:
            block.register_forward_pre_hook(lambda _, args: (keep(args[0]), *args[1:]))
        x, t, c = torch.randn(4, 64, 64), torch.rand(4), torch.randn(4, 64, 96)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(x, t, c)
        return sum(storage.nbytes() for storage in storages.values())

    assert saved(replace(model, **SAVING)) <= 0.5 * saved(model)


def test_the_plan_of_many_gpus_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The official nextdit on the testbed's tokens; no run directory is made, no weight either."""
    official = ModelConfig("nextdit", 1792, 24, 28, 28, 0, conditioning="cross", key_rope=False)
    far = {
        "plan": True,
        "strategy": StrategyConfig("auto"),
        "world": 64,
        "batch_size": 4096,
        "model": official,
    }
    kept = allocator_peak(lambda: run_training(config("1", **far), tmp_path / "run", []))
    said = " ".join(capsys.readouterr().out.split())
    assert "64 x H100" in said
    assert "a rank, ddp 2" in said
    assert "a rank, fsdp2" in said
    assert "4096 = 64 process(es) x 64 x 1 accumulated" in said
    assert "GB/s in all" in said
    assert not (tmp_path / "run").exists()
    assert kept < 2**28
    with pytest.raises(UserError, match="does not divide over 48 processes"):
        run_training(config("1", **far | {"world": 48}), tmp_path, [])
    with pytest.raises(UserError, match="choose from H200"):
        run_training(config("1", **far, gpu="H1000"), tmp_path, [])
