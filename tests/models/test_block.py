"""Switches of the DiT: what each changes, and that it changes nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.block import Branch
from blip3o_lit.models.dit import DiT
from blip3o_lit.models.optimizer import make_optimizer

TINY = ModelConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_width=48)
SHAPE = PairShape(TokenShape((3, 3), False, 24), TokenShape((3, 3), False, 20))


def build(**changes):
    """Build a network whose zero-initialised layers are not zero."""
    torch.manual_seed(0)
    network = DiT(dataclasses.replace(TINY, **changes), SHAPE)
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def inputs(batch=2):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, 9, 20, generator=generator)
    c = torch.randn(batch, 9, 24, generator=generator)
    return x, torch.rand(batch, generator=generator), c


def branch(**changes):
    """Build one branch around the identity, in time=tokens, where it has no modulation."""
    torch.manual_seed(0)
    made = Branch(torch.nn.Identity(), dataclasses.replace(TINY, time="tokens", **changes))
    return made.eval()


def normed(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_a_plain_branch_adds_its_layer_of_the_normed_input():
    x = 3 * torch.randn(2, 4, 32)
    torch.testing.assert_close(branch()(x, None), x + normed(x))


def test_sandwich_norm_normalises_what_is_added():
    x, made = torch.randn(2, 4, 32), branch(sandwich_norm=True)
    made.layer = torch.nn.Linear(32, 32)
    torch.testing.assert_close(made(x, None), x + normed(made.layer(normed(x))))


def test_layer_norm_takes_the_mean_out_and_has_a_bias():
    x, made = 3 + torch.randn(2, 4, 32), branch(norm="layer")
    centred = x - x.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(made(x, None), x + expected)
    made.norm.bias.data[3] = 5
    torch.testing.assert_close(made(x, None)[..., 3], (x + expected + 5)[..., 3])


def test_layer_scale_is_a_factor_a_channel():
    x, made = torch.randn(2, 4, 32), branch(layer_scale=0.1)
    torch.testing.assert_close(made(x, None), x + 0.1 * normed(x))
    made.scale.data[3] = 5
    torch.testing.assert_close(made(x, None)[..., 3], (x + 5 * normed(x))[..., 3])


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    x, made = torch.ones(200, 4, 32), branch(dropout=0.25)
    torch.testing.assert_close(made(x, None), x + normed(x))
    added = made.train()(x, None) - x
    assert (added == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert added.mean().item() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("conditioning", ["aligned", "cross"])
def test_positions_none_makes_the_network_equivariant_to_the_order_of_tokens(conditioning):
    x, t, c = inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for positions in ("none", "rope", "learned", "both"):
        network = build(positions=positions, conditioning=conditioning)
        moved = network(x[:, order], t, c[:, order])
        same = torch.allclose(moved, network(x, t, c)[:, order], atol=1e-5)
        assert same == (positions == "none"), positions


def test_key_rope_decides_whether_cross_attention_knows_where_the_condition_is():
    x, t, c = inputs()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for key_rope in (True, False):
        network = build(conditioning="cross", key_rope=key_rope)
        same = torch.allclose(network(x, t, c[:, order]), network(x, t, c), atol=1e-5)
        assert same == (not key_rope)


@pytest.mark.parametrize("positions", ["learned", "both"])
def test_learned_positions_reach_each_token_and_are_not_decayed(positions):
    network = build(positions=positions, conditioning="cross")
    rest = make_optimizer(network, OptimizerConfig()).param_groups[1]["params"]
    for vectors in (network.positions, network.positions_condition):
        assert any(vectors is p for p in rest)
    assert network.positions.shape == (9, 32)
    assert (network.rope is None) == (positions == "learned")


def test_time_on_tokens_has_no_modulation_and_still_reads_time_and_pooled_condition():
    network, (x, t, c) = build(time="tokens"), inputs()
    assert not any("modulation" in name for name, _ in network.named_parameters())
    out, encoded = network(x, t, c), network.encode(c)
    assert (network(x, 1 - t, c) - out).abs().max() > 1e-3
    moved = encoded._replace(pooled=encoded.pooled + 1)
    assert (network(x, t, moved) - out).abs().max() > 1e-3


def test_gelu_has_the_plain_two_matrices():
    mlp = build(mlp="gelu").blocks[0].mlp.layer
    assert [tuple(p.shape) for p in mlp.parameters()] == [(48, 32), (48,), (32, 48), (32,)]


def test_without_zero_init_the_output_starts_alive():
    x, t, c = inputs()
    config = dataclasses.replace(TINY, zero_init_output=False)
    assert DiT(config, SHAPE)(x, t, c).std() > 0.1
    assert not DiT(TINY, SHAPE)(x, t, c).any()


def test_adapter_is_deep_and_starts_near_its_linear_map():
    torch.manual_seed(0)
    network = DiT(dataclasses.replace(TINY, adapter_depth=5), SHAPE)
    assert len(network.condition.layers) == 5
    linear = network.condition.linear(inputs()[2])
    ratio = (network.condition(inputs()[2]) - linear).std() / linear.std()
    assert 0.01 < ratio < 0.5


SWITCHES = [
    {"positions": "learned"},
    {"positions": "both"},
    {"time": "tokens"},
    {"mlp": "gelu"},
    {"norm": "layer"},
    {"norm": "layer", "time": "tokens", "sandwich_norm": True},
    {"sandwich_norm": True},
    {"layer_scale": 0.1},
    {"adapter_depth": 2},
    {"conditioning": "cross", "time": "tokens", "positions": "learned", "key_rope": False},
]


@pytest.mark.parametrize("changes", SWITCHES, ids=lambda changes: "-".join(changes))
def test_each_switch_trains_counts_its_flops_and_comes_from_meta(changes):
    config, (x, t, c) = dataclasses.replace(TINY, **changes), inputs()
    with torch.device("meta"):
        network = DiT(config, SHAPE)
    network.to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    network.init_weights()
    assert not network(x, t, c).any()
    for parameter in network.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    with FlopCounterMode(display=False) as counter:
        out = network(x, t, c)
    assert network.forward_flops(2) == counter.get_total_flops()
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())
    groups = make_optimizer(network, OptimizerConfig()).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
