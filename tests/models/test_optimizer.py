"""The optimizers: Muon and AdamW in one, against torch's own two."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon
from tracked import allocator_peak

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import MUON_LAYERS, OptimizerConfig
from blip3o_lit.models import muon
from blip3o_lit.models.muon import orthogonalised
from blip3o_lit.models.network import Network
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.models.precision import bf16_is_faster

SHAPE = PairShape(TokenShape((2, 2), False, 6), TokenShape((2, 2), False, 4))
CONFIG = OptimizerConfig("muon", muon_layers="tokens", lr=1e-2, weight_decay=0.1)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    size = ModelConfig(width=16, depth=2, heads=2, kv_heads=1, mlp_width=32)
    made = build_network(size, SHAPE)
    for parameter in made.parameters():  # nothing stays at zero
        nn.init.normal_(parameter, std=0.1)
    return made


def draw_gradients(network: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in network.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("layers", MUON_LAYERS)
def test_it_steps_as_torchs_two_optimizers_apart(network: Network, layers: str) -> None:
    other = copy.deepcopy(network)
    joined = make_optimizer(network, replace(CONFIG, muon_layers=layers))
    linear = [layer.weight for layer in other.modules() if isinstance(layer, nn.Linear)]
    ends = (other.input, other.condition, other.pool, other.output)
    hidden = [p for name, p in other.named_parameters() if "blocks." in name and p.ndim == 2]
    hidden += [layer.weight for layer in ends if layers == "tokens"]
    own = {id(p) for p in hidden}
    decayed = {id(p) for p in linear} - own
    reference = Muon(hidden, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    groups = [
        {"params": [p for p in other.parameters() if id(p) in decayed], "weight_decay": 0.1},
        {
            "params": [p for p in other.parameters() if id(p) not in decayed | own],
            "weight_decay": 0.0,
        },
    ]
    adamw = AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)
    before = copy.deepcopy(network)
    for step in range(3):
        for made in (network, other):
            draw_gradients(made, step)
        joined.step()
        reference.step()
        adamw.step()
    # Steps are 2e-3. A stack of matrices is multiplied in another order than one at a time;
    # where the device is slow in bf16, ours are in fp32 and torch's alone are rounded.
    near = 2e-4 if bf16_is_faster("cpu") else 4e-4
    for (name, mine), theirs in zip(network.named_parameters(), other.parameters(), strict=True):
        if id(theirs) in own:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=near, msg=name)
        else:
            assert torch.equal(mine, theirs), name
    assert not any(torch.equal(x, y) for x, y in zip(network.parameters(), before.parameters()))


def test_a_stack_is_orthogonalised_as_its_matrices_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 40), (3, 40, 24), (2, 16, 16)):
        stack = torch.randn(shape, generator=generator)
        together = orthogonalised(stack).float()
        for one, made in zip(stack, together):
            torch.testing.assert_close(made, orthogonalised(one).float(), rtol=0, atol=0.02)
            assert 0.6 < torch.linalg.svdvals(made).min() < torch.linalg.svdvals(made).max() < 1.25
            u, _, vh = torch.linalg.svd(one, full_matrices=False)
            rotated = u.mT @ made @ vh.mT  # the same singular vectors: diagonal
            assert (rotated - rotated.diagonal().diag()).abs().max() < 0.05


def test_a_stack_takes_ten_bytes_per_number_or_sixteen_in_fp32() -> None:
    parameters = [nn.Parameter(torch.randn(256, 512)) for _ in range(8)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    group = {"params": parameters, "lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    state: dict[nn.Parameter, dict[str, torch.Tensor]] = {p: {} for p in parameters}
    step = partial(muon.muon_step, group, state, torch.zeros(()))
    step()  # makes the momentum
    numbers = sum(parameter.numel() for parameter in parameters)
    assert allocator_peak(step) <= (10.5 if bf16_is_faster("cpu") else 16.5) * numbers


def test_stacks_hold_one_shape_each_and_few_numbers() -> None:
    parameters = [torch.zeros(2, 4) for _ in range(5)] + [torch.zeros(4, 2), torch.zeros(9, 9)]
    found = list(muon.stacks(parameters, elements=20))
    assert [[tuple(p.shape) for p in stack] for stack in found] == [
        [(2, 4), (2, 4)],
        [(2, 4), (2, 4)],
        [(2, 4)],
        [(4, 2)],
        [(9, 9)],
    ]
    assert sorted(id(p) for stack in found for p in stack) == sorted(id(p) for p in parameters)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(network: Network, name: str) -> None:
    optimizer = make_optimizer(network, OptimizerConfig(name))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_the_weights_of_linear_layers_decay(network: Network, name: str) -> None:
    optimizer = make_optimizer(network, OptimizerConfig(name, weight_decay=0.1))
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]}
    assert decayed == {id(m.weight) for m in network.modules() if isinstance(m, nn.Linear)}


def test_saved_and_loaded_it_goes_on_to_the_last_bit(network: Network) -> None:
    first = make_optimizer(network, CONFIG)
    for step in range(2):
        draw_gradients(network, step)
        first.step()
    other = copy.deepcopy(network)
    second = make_optimizer(other, CONFIG)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for made, optimizer in ((network, first), (other, second)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3  # as a schedule does
        draw_gradients(made, 2)
        optimizer.step()
    assert equal(network, other)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_is_not_finite_moves_nothing(network: Network, name: str) -> None:
    optimizer = make_optimizer(network, OptimizerConfig(name))
    draw_gradients(network, 0)
    optimizer.step()
    weights, state = copy.deepcopy(network), copy.deepcopy(optimizer.state_dict()["state"])
    draw_gradients(network, 1)
    network.blocks[0].get_parameter("mlp.layer.down.weight").grad.fill_(float("nan"))  # type: ignore[union-attr]
    optimizer.found_inf = torch.ones(())  # type: ignore[attr-defined]
    optimizer.step()
    assert equal(network, weights)
    for number, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, state[number][key]), (number, key)
