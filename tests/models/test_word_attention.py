"""Conditions of words: masks, the null token, joined grids; parity is in `test_nextdit.py`."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.base.condition import Condition, dropped
from blip3o_lit.base.shape import PairShape, SequenceShape, TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.network_of import build_network

DIT = ModelConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_width=48, conditioning="cross")
NEXTDIT = ModelConfig(
    architecture="nextdit",
    width=48,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=0,
    multiple_of=16,
    conditioning="cross",
)
TARGET, GRID = TokenShape((4, 3), False, 20), TokenShape((4, 3), True, 24)
LENGTHS = torch.tensor([0, 1, 4, 7])
NETWORKS = pytest.mark.parametrize("config", [DIT, NEXTDIT], ids=["dit", "nextdit"])
BOTH = pytest.mark.parametrize("grid", [None, GRID], ids=["words", "grid and words"])


def awake(config, grid=None, words=True):
    """Build a network whose zero-initialised layers are not zero."""
    torch.manual_seed(0)
    shape = PairShape(grid, TARGET, SequenceShape(7, 10) if words else None)
    network = build_network(config, shape)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


def inputs(grid=None, length_B=LENGTHS):
    """Return x, t and a condition of so many words an image, with noise behind them."""
    random = torch.Generator().manual_seed(1)
    images = len(length_B)
    x_BND = torch.randn(images, TARGET.tokens, TARGET.width, generator=random)
    grid_BMC = None
    if grid is not None:
        grid_BMC = torch.randn(images, grid.tokens, grid.width, generator=random)
    words_BLE = torch.randn(images, 7, 10, generator=random)
    return x_BND, torch.rand(images, generator=random), Condition(grid_BMC, words_BLE, length_B)


@NETWORKS
@BOTH
@pytest.mark.parametrize("value", [1e4, torch.inf, torch.nan])
@torch.no_grad()
def test_what_lies_in_the_padding_changes_no_bit(config, grid, value):
    network, (x, t, c) = awake(config, grid), inputs(grid)
    other = c.words.masked_fill(~c.present[..., None], value)
    out = network(x, t, c)
    assert out.std() > 0.1
    assert torch.equal(network(x, t, dataclasses.replace(c, words=other)), out)


@NETWORKS
@BOTH
@torch.no_grad()
def test_neither_its_length_nor_the_other_captions_of_a_batch_matter(config, grid):
    """Captions of 0 to 7 words alone, with no padding, beside all of them in one batch."""
    length_B = torch.arange(8)
    network, (x, t, c) = awake(config, grid), inputs(grid, length_B)
    together = network(x, t, c)
    for row, length in enumerate(length_B.tolist()):
        one = slice(row, row + 1)
        own = dataclasses.replace(c[one], words=c.words[one, :length])
        assert (network(x[one], t[one], own) - together[one]).abs().max() <= 1e-5


@NETWORKS
@BOTH
def test_the_padding_has_no_gradient_and_each_word_has_one(config, grid):
    network, (x, t, c) = awake(config, grid), inputs(grid)
    words = c.words.clone().requires_grad_()
    network(x, t, dataclasses.replace(c, words=words)).square().sum().backward()
    assert not words.grad[~c.present].any()
    assert words.grad[c.present].abs().sum(-1).min() > 1e-6
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


@NETWORKS
@torch.no_grad()
def test_words_are_read_and_so_is_the_grid_beside_them(config):
    network, (x, t, c) = awake(config, GRID), inputs(GRID)
    out = network(x, t, c)
    other = dataclasses.replace(c, words=c.words.flip(2))
    changed = (network(x, t, other) - out).abs().amax((1, 2))
    assert changed[0] == 0  # it has no words
    assert changed[1:].min() > 1e-3
    other = dataclasses.replace(c, grid=c.grid.flip(2))
    assert (network(x, t, other) - out).abs().amax((1, 2)).min() > 1e-3


@NETWORKS
@BOTH
@torch.no_grad()
def test_a_dropped_condition_is_the_same_for_all(config, grid):
    """Its grid is the mean token and it has no word, whatever it was."""
    network, (x, t, c) = awake(config, grid), inputs(grid)
    some = dropped(c, torch.tensor([False, True, True, False]))
    out = network(x, t, some)
    nothing = network(x, t, dropped(c))
    assert torch.equal(out[1:3], nothing[1:3])
    assert torch.equal(out[[0, 3]], network(x, t, c)[[0, 3]])
    other = dropped(inputs(grid, LENGTHS.flip(0))[2])
    assert torch.equal(network(x, t, other), nothing)


class Operations(TorchDispatchMode):
    """Keeps the names of operations, and which attention had a mask."""

    def __init__(self):
        super().__init__()
        self.names, self.masked = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        if "attention" in func.name():
            given = {**dict(zip((a.name for a in func._schema.arguments), args)), **(kwargs or {})}
            mask = given.get("attn_mask", given.get("attn_bias"))
            self.masked += mask is not None
        return func(*args, **(kwargs or {}))


@NETWORKS
def test_a_grid_alone_runs_what_it_did_and_words_a_mask_a_block(config):
    """No operation that only words need, and an attention without a mask in each place."""
    found = {}
    for grid, words in ((GRID, False), (None, True)):
        network, (x, t, c) = awake(config, grid, words), inputs(grid)
        with Operations() as operations, torch.no_grad():
            network(x, t, c if words else c.grid)
        found[words] = operations
    of_words = {"aten::lt.Tensor", "aten::masked_fill.Scalar"}
    assert of_words <= set(found[True].names)
    assert not of_words & set(found[False].names)
    assert found[False].masked == 0
    assert found[True].masked == config.depth
    attention = [name for name in found[False].names if "attention" in name]
    assert len(attention) == 2 * config.depth


@NETWORKS
@BOTH
def test_flops_and_recomputation_know_words(config, grid):
    network, (x, t, c) = awake(config, grid), inputs(grid)
    with FlopCounterMode(display=False) as counter:
        out = network(x, t, c)
    assert network.forward_flops(len(x)) == counter.get_total_flops()
    out.square().sum().backward()
    for change in ({"activation_checkpointing": True}, {"activation_budget": 0.5}):
        saving = awake(dataclasses.replace(config, **change), grid)
        saving.load_state_dict(network.state_dict())
        saving(x, t, c).square().sum().backward()
        for a, b in zip(network.parameters(), saving.parameters()):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@NETWORKS
def test_compiled_blocks_are_one_graph_for_captions_of_any_length(config):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    network, plain = awake(config), awake(config)
    network.compile_blocks("eager")
    for length in (7, 3, 5):
        x, t, c = inputs(length_B=LENGTHS.clamp_max(length))
        c = dataclasses.replace(c, words=c.words[:, :length])
        torch.testing.assert_close(network(x, t, c), plain(x, t, c), atol=1e-6, rtol=0)
    stats, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    assert (stats, breaks) == (1, 0)


def test_aligned_conditioning_is_refused_with_the_override():
    shape = PairShape(GRID, TARGET, SequenceShape(7, 10))
    with pytest.raises(UserError, match="use model.conditioning=cross") as caught:
        build_network(dataclasses.replace(DIT, conditioning="aligned"), shape)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("positions", ["rope", "both"])
@torch.no_grad()
def test_without_noise_an_empty_caption_says_nothing_of_places(positions):
    """One key has one value: a rotation alone leaves every position the same token."""
    network = awake(dataclasses.replace(DIT, positions=positions))
    x_BND, t_B, condition = inputs()
    out_BND = network(torch.zeros_like(x_BND), 0 * t_B, condition)
    spread_B = (out_BND - out_BND[:, :1]).abs().amax((1, 2))
    assert (spread_B[0] > 1e-3) == (positions == "both")
    assert spread_B[1:].min() > 1e-4  # several keys are weighed by where the query is
