"""NextDiT: parity with diffusers' Lumina-Next, the official names, counts, and the house rules."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from diffusers import LuminaNextDiT2DModel
from diffusers.models.embeddings import PixArtAlphaTextProjection, get_2d_rotary_pos_embed_lumina
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.base.condition import Condition
from blip3o_lit.base.shape import PairShape, SequenceShape, TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.network import EncodedCondition
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.nextdit import NextDiT
from blip3o_lit.models.words import key_mask

TINY = ModelConfig(
    architecture="nextdit",
    width=48,
    depth=2,
    heads=4,
    kv_heads=2,
    mlp_width=0,
    multiple_of=16,
    conditioning="cross",
    key_rope=False,
)
OFFICIAL = ModelConfig(
    architecture="nextdit",
    width=1792,
    depth=24,
    heads=28,
    kv_heads=28,
    mlp_width=0,
    conditioning="cross",
    key_rope=False,
)
SHAPE = PairShape(TokenShape((3, 4), False, 24), TokenShape((3, 4), False, 20))


class Reference(nn.Module):
    """The official model: diffusers' transformer behind a caption projection."""

    def __init__(self, config, shape):
        super().__init__()
        self.model = LuminaNextDiT2DModel(
            sample_size=shape.target.grid[0],
            patch_size=1,
            in_channels=shape.target.width,
            hidden_size=config.width,
            num_layers=config.depth,
            num_attention_heads=config.heads,
            num_kv_heads=config.kv_heads,
            multiple_of=config.multiple_of,
            ffn_dim_multiplier=config.ffn_dim_multiplier,
            learn_sigma=False,
            cross_attention_dim=config.width,
        )
        self.model.caption_projection = PixArtAlphaTextProjection(
            shape.condition.width, config.width
        )
        self.grid, self.head_width = shape.target.grid, config.width // config.heads

    def velocity(self, x, t, c, mask=None):
        """Return data - noise from a network of noise level 1000 (1 - t) that says noise - data."""
        out = self.model(
            hidden_states=x.transpose(1, 2).unflatten(2, self.grid),
            timestep=1000 * (1 - t),
            encoder_hidden_states=self.model.caption_projection(c),
            encoder_mask=torch.ones(c.shape[:2]) if mask is None else mask,
            image_rotary_emb=get_2d_rotary_pos_embed_lumina(self.head_width, 384, 384),
            cross_attention_kwargs={},
        ).sample
        return -out.flatten(2).transpose(1, 2)


def reference(config, shape):
    """Build the reference with weights that exercise every gate and norm."""
    torch.manual_seed(0)
    model = Reference(config, shape).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            parameter.data.add_(0.2 * torch.randn_like(parameter))
        if "pad_token" in name:  # left empty by diffusers, read by nobody
            parameter.data.zero_()
    return model


def inputs(shape, batch=2):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(batch, shape.target.tokens, shape.target.width, generator=generator)
    c = torch.randn(batch, shape.condition.tokens, shape.condition.width, generator=generator)
    return x, torch.rand(batch, generator=generator), c


def awake(config=TINY, shape=SHAPE):
    torch.manual_seed(0)
    network = NextDiT(config, shape)
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


@pytest.mark.parametrize("multiplier", [1.0, 1.5])
@torch.no_grad()
def test_the_model_equals_diffusers_with_grouped_keys(multiplier):
    config = dataclasses.replace(TINY, mlp_width=0, ffn_dim_multiplier=multiplier)
    theirs, ours = reference(config, SHAPE), NextDiT(config, SHAPE)
    ours.load_official(theirs.state_dict())
    x, t, c = inputs(SHAPE)
    expected = theirs.velocity(x, t, c)
    assert expected.std() > 0.1
    assert (ours(x, t, c) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_words_behind_a_mask_are_those_of_diffusers():
    """All of the network but its null token, which they don't have: captions are 1 to 7 words."""
    shape = PairShape(None, SHAPE.target, SequenceShape(7, 24))
    theirs, ours = reference(TINY, SHAPE), NextDiT(TINY, shape)
    ours.load_official(theirs.state_dict())
    x, t, _ = inputs(SHAPE, batch=4)
    length_B = torch.tensor([1, 3, 4, 7])
    condition = Condition(None, torch.randn(4, 7, 24), length_B)
    expected = theirs.velocity(x, t, condition.words, condition.present.float())
    words_BLW, pooled_BT = ours.words(condition)
    pairs = tuple(block.keys_values(words_BLW, None) for block in ours.blocks)
    encoded = EncodedCondition(None, pooled_BT, pairs, key_mask(length_B, 7, 7))
    assert expected.std() > 0.1
    assert (ours(x, t, encoded) - expected).abs().max() <= 1e-5
    unmasked = (ours(x, t, encoded._replace(mask=None)) - expected).abs().amax((1, 2))
    assert unmasked[:3].min() > 1e-3
    names = {name.removeprefix("model.") for name in theirs.state_dict()} - {"pad_token"}
    assert set(ours.official_state()) == names


@pytest.mark.parametrize(("multiplier", "hidden"), [(1.0, 4864), (1.5, 7168)])
@torch.no_grad()
def test_a_block_of_official_size_equals_diffusers(multiplier, hidden):
    """One block at 1792 channels and 28 heads over 8x8 tokens, in both feed-forward widths."""
    config = dataclasses.replace(OFFICIAL, depth=1, mlp_width=0, ffn_dim_multiplier=multiplier)
    assert config.mlp_width == hidden
    shape = PairShape(TokenShape((8, 8), False, 64), TokenShape((8, 8), False, 32))
    theirs = reference(config, shape)
    with torch.device("meta"):
        ours = NextDiT(config, shape)
    ours.to_empty(device="cpu").init_weights()
    ours.load_official(theirs.state_dict())
    x, t, c = inputs(shape, batch=1)
    assert (ours(x, t, c) - theirs.velocity(x, t, c)).abs().max() <= 1e-5


def test_official_names_and_layout_round_trip_bit_for_bit():
    state = reference(TINY, SHAPE).state_dict()
    network = NextDiT(TINY, SHAPE)
    network.load_official({f"model.dit.{key}": tensor for key, tensor in state.items()})
    back = network.official_state()
    names = {key.removeprefix("model.") for key in state} - {"pad_token"}
    assert set(back) == names
    for name, tensor in back.items():
        assert torch.equal(tensor, state[f"model.{name}"]), name
    again = NextDiT(TINY, SHAPE)
    again.load_official(back)
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key


@pytest.mark.parametrize(
    ("multiplier", "source", "target", "parameters"),
    [
        (1.0, 3584, 1792, 1_365_010_336),
        (1.5, 3584, 1792, 1_662_281_632),
        (1.0, 1280, 768, 1_357_210_528),
        (1.5, 1280, 768, 1_654_481_824),
    ],
)
def test_parameter_counts_at_full_size_are_those_of_diffusers(
    multiplier, source, target, parameters
):
    config = dataclasses.replace(OFFICIAL, mlp_width=0, ffn_dim_multiplier=multiplier)
    shape = PairShape(TokenShape((8, 8), False, source), TokenShape((8, 8), False, target))
    with torch.device("meta"):
        ours, theirs = build_network(config, shape), Reference(config, shape)
    counts = [sum(p.numel() for p in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == parameters
    assert counts[1] - config.width == parameters  # their pad_token is never used


def test_weights_of_another_feed_forward_width_are_refused_with_the_override():
    other = dataclasses.replace(TINY, mlp_width=0, ffn_dim_multiplier=1.5)
    state = reference(other, SHAPE).state_dict()
    with pytest.raises(UserError, match="model.ffn_dim_multiplier") as caught:
        NextDiT(TINY, SHAPE).load_official(state)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="model.depth=3"):
        NextDiT(dataclasses.replace(TINY, depth=3), SHAPE).load_official(state)
    with pytest.raises(UserError, match="not a BLIP3-o DiT"):
        NextDiT(TINY, SHAPE).load_official({"weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"conditioning": "aligned"}, "model.conditioning=cross"),
        ({"mlp": "gelu"}, "model.mlp=gelu"),
        ({"layer_scale": 0.1}, "model.layer_scale=0.1"),
        ({"architecture": "nextdti"}, "model.architecture=nextdit"),
    ],
)
def test_switches_that_the_block_lacks_are_refused_in_one_line(change, word):
    with pytest.raises(UserError, match=word) as caught:
        dataclasses.replace(TINY, **change)
    assert "\n" not in str(caught.value)


def test_output_is_zero_at_the_start_and_every_parameter_wakes_up():
    network, (x, t, c) = NextDiT(TINY, SHAPE), inputs(SHAPE)
    assert not network(x, t, c).any()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.3)
    for _ in range(4):  # output, then gates, then the cross gates, then what they let through
        optimizer.zero_grad()
        (network(x, t, c) - torch.randn_like(x)).square().mean().backward()
        optimizer.step()
    dead = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_encoding_once_flops_and_checkpointing():
    network, (x, t, c) = awake(), inputs(SHAPE)
    encoded = network.encode(c)
    assert torch.equal(network(x, t, encoded), network(x, t, c))
    with FlopCounterMode(display=False) as counter:
        out = network(x, t, c)
    assert network.forward_flops(2) == counter.get_total_flops()
    saving = NextDiT(dataclasses.replace(TINY, activation_checkpointing=True), SHAPE)
    saving.load_state_dict(network.state_dict())
    out.square().sum().backward()
    saving(x, t, c).square().sum().backward()
    for a, b in zip(network.parameters(), saving.parameters()):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


def test_bf16_runs_near_fp32():
    network, (x, t, c) = awake(), inputs(SHAPE)
    exact = network(x, t, c)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = network(x, t, c)
    half = network.bfloat16()(x, t, c)
    for out in (mixed, half):
        assert out.dtype == torch.float32
        assert (out - exact).abs().max() < 0.08 * exact.abs().max()


def test_cls_tokens_unequal_grids_and_rotated_keys_are_possible():
    shape = PairShape(TokenShape((2, 2), True, 24), TokenShape((3, 4), True, 20))
    x, t, c = inputs(shape)
    order = [0, 2, 1, 4, 3]
    for key_rope in (False, True):
        network = awake(dataclasses.replace(TINY, key_rope=key_rope), shape)
        same = torch.allclose(network(x, t, c[:, order]), network(x, t, c), atol=1e-5)
        assert same == (not key_rope)
