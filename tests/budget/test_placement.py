"""A run's layout: every machine, launcher and override gives a layout that fits, or one line."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.activations import activations
from blip3o_lit.budget.machine import Machine, peak_flops
from blip3o_lit.budget.placement import USABLE, resolve
from blip3o_lit.budget.plan import Plan
from blip3o_lit.budget.states import rank_bytes, units
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    PRECISIONS,
    PrecisionConfig,
    StrategyConfig,
    TrainerConfig,
)
from blip3o_lit.models.precision import PRECISIONS as FORMATS

STRATEGIES = ("auto", "single", "ddp", "fsdp2")
SHAPE = PairShape(TokenShape((8, 8), False, 96), TokenShape((8, 8), False, 64))
SMALL = ModelConfig(width=96, depth=2, heads=4, kv_heads=2, mlp_width=256)


def machine(gpus: int, launcher: str, devices: str, nodes: int, gb: int = 80) -> Machine:
    """A node of GPUs, or a CPU; a launcher starts one process per device of every node."""
    many = {"launcher": launcher}
    if launcher != "plain":
        started = int(devices) if devices != "auto" else max(gpus, 1)
        many |= {"processes": started, "nodes": nodes}
    if gpus:
        return Machine("cuda", "H100", gpus, gb * 10**9, **many)
    return Machine("cpu", "cpu", 1, 16 * 10**9, **many)


def run(devices: str, nodes: int, batch: int, strategy: str, precision: str) -> TrainConfig:
    return TrainConfig(
        model=SMALL,
        trainer=TrainerConfig(devices=devices, num_nodes=nodes),
        batch_size=batch,
        strategy=StrategyConfig(strategy),
        precision=PrecisionConfig(precision),
    )


@pytest.mark.parametrize("launcher", ["plain", "torchrun", "srun"])
@pytest.mark.parametrize("gpus", [0, 1, 8])
def test_every_layout_divides_or_names_a_key_that_was_given(gpus: int, launcher: str) -> None:
    layouts, refusals = 0, []
    for devices, nodes, batch, strategy, precision in itertools.product(
        ("auto", "1", "8"), (1, 2), (32, 512), STRATEGIES, PRECISIONS
    ):
        config = run(devices, nodes, batch, strategy, precision)
        try:
            place = resolve(config, SHAPE, machine(gpus, launcher, devices, nodes))
        except UserError as error:
            refusals.append((str(error), devices, nodes, strategy, precision))
            continue
        layouts += 1
        assert place.strategy in ("single", "ddp", "fsdp2")
        assert place.world * place.micro_batch * place.accumulation == batch
        assert (place.strategy == "single") <= (place.world == 1)
        assert place.precision is FORMATS["bf16" if precision == "auto" else precision]
        assert place.world == 1 or place.strategy != "single"
        if devices != "auto":
            assert place.devices == int(devices)
    assert layouts > 40
    for line, devices, nodes, strategy, precision in refusals:
        given = {
            "trainer.devices=": devices != "auto",
            "trainer.num_nodes=": nodes != 1,
            "strategy=": strategy != "auto",
            "precision=": precision not in ("auto", "bf16"),
        }
        assert any(word in line and there for word, there in given.items()), line


def test_the_default_uses_every_gpu_of_a_node() -> None:
    config = TrainConfig(model=SMALL)
    place = resolve(config, SHAPE, machine(8, "plain", "auto", 1))
    assert (place.device, place.devices, place.nodes, place.strategy) == ("cuda", 8, 1, "ddp")
    assert config == TrainConfig(model=SMALL)  # nothing in it was changed


def test_the_number_format_is_the_machines_unless_a_word_was_given() -> None:
    slow = replace(machine(0, "plain", "auto", 1), precision="fp32")
    for word, expected in (("auto", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")):
        assert resolve(run("auto", 1, 32, "auto", word), SHAPE, slow).precision.name == expected
    fast = machine(1, "plain", "auto", 1)
    assert resolve(run("auto", 1, 32, "auto", "auto"), SHAPE, fast).precision.name == "bf16"


def test_a_micro_batch_fills_the_device_and_not_more() -> None:
    config = run("auto", 1, 4096, "auto", "fp32")
    counts, formats = units(SMALL, SHAPE), FORMATS["fp32"]
    kept = activations(SMALL, config.flow, SHAPE, formats, "cuda")
    states = rank_bytes("single", counts, formats, config.optimizer, 1, True)
    for gb in (1, 2, 8):
        there = machine(1, "plain", "auto", 1, gb)
        place = resolve(config, SHAPE, there)
        room = there.memory * USABLE["cuda"]
        assert states + kept.of(place.micro_batch, "single") <= room
        assert states + kept.of(2 * place.micro_batch, "single") > room


def test_processes_on_a_cpu_share_its_memory() -> None:
    config = run("8", 1, 8 * 4096, "ddp", "fp32")
    counts, formats = units(SMALL, SHAPE), FORMATS["fp32"]
    kept = activations(SMALL, config.flow, SHAPE, formats)
    states = rank_bytes("ddp", counts, formats, config.optimizer, 8, True)
    there = machine(0, "plain", "auto", 1)
    place = resolve(config, SHAPE, there)
    room = there.memory * USABLE["cpu"] / 8
    assert states + kept.of(place.micro_batch, "ddp") <= room
    assert states + kept.of(2 * place.micro_batch, "ddp") > room


def test_fsdp2_needs_no_room_for_autocasts_copies() -> None:
    """Memory for 64 images to the byte: the chosen micro-batch and the plan count alike."""
    config = run("auto", 1, 4096, "fsdp2", "bf16")
    counts, formats = units(SMALL, SHAPE), FORMATS["bf16"]
    kept = activations(SMALL, config.flow, SHAPE, formats, "cuda")
    assert kept.fixed > 0
    states = rank_bytes("fsdp2", counts, formats, config.optimizer, 8, accumulated=True)
    needed = states + 64 * kept.image
    exact = math.ceil(needed / USABLE["cuda"]) + 1
    there = replace(machine(8, "plain", "auto", 1), memory=exact)
    place = resolve(config, SHAPE, there)
    assert place.micro_batch == 64
    plan = Plan(config, place, there.name, SHAPE, "no-store", 1, 1, 1)
    assert plan.state_bytes() + plan.activation_bytes() == needed


def test_what_the_machine_lacks_is_refused_by_the_word_that_asks_for_it() -> None:
    cpu, gpu = machine(0, "plain", "auto", 1), machine(1, "plain", "auto", 1)
    for config, where, words in (
        (run("auto", 1, 32, "auto", "fp16"), cpu, "precision=fp16 needs a CUDA GPU"),
        (run("auto", 1, 32, "auto", "tf32"), replace(gpu, tf32=False), "precision=tf32"),
        (run("auto", 1, 32, "auto", "bf16"), replace(gpu, bf16=False), "precision=bf16"),
        (run("2", 1, 32, "auto", "bf16"), gpu, "trainer.devices=2: this machine has 1 GPU"),
        (run("3", 1, 32, "ddp", "bf16"), cpu, "batch_size=32 does not divide over 3"),
        (run("8", 1, 32, "single", "bf16"), cpu, "strategy=single with 8 processes"),
        (run("2", 1, 32, "ddp", "bf16"), machine(8, "srun", "8", 1), "srun started 8"),
        (run("auto", 3, 32, "ddp", "bf16"), machine(8, "torchrun", "8", 2), "on 2 nodes"),
    ):
        with pytest.raises(UserError, match=words):
            resolve(config, SHAPE, where)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
    ],
)
def test_a_cards_peak_is_that_of_its_own_kind(name: str, peak: float) -> None:
    assert peak_flops(torch.device("cuda", 0), name, FORMATS["bf16"]) == peak


@pytest.mark.parametrize(("name", "replicas"), [("ddp", 2), ("fsdp2", 3), ("auto", 2)])
def test_replicas_that_cannot_be_are_refused(name: str, replicas: int) -> None:
    config = run("8", 1, 32, name, "bf16")
    config.strategy.replicas = replicas
    with pytest.raises(UserError, match=f"strategy.replicas={replicas}"):
        resolve(config, SHAPE, machine(8, "plain", "8", 1))
