"""Layers: rotary geometry, grouped queries, feed-forward, time embedding, by closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.models.layers import (
    GELUMLP,
    DeepAdapter,
    SelfAttention,
    SwiGLU,
    TimeEmbedding,
    attend,
    gated_product,
    rope_table,
    sinusoid,
)
from blip3o_lit.models.norms import rotate


def scores(shape, head_width=16, **options):
    """Return q . k for one query and one key vector put at every pair of positions, [N, N]."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, head_width, dtype=torch.float64)
    table = rope_table(shape, head_width, **options).double()
    q, k = (rotate(x.expand(1, shape.tokens, 1, -1), table)[0, :, 0] for x in (q, k))
    return q @ k.T


def test_rope_scores_depend_on_the_grid_offset_alone():
    rows, columns = 5, 4
    by_cell = scores(TokenShape((rows, columns), False, 1)).view(rows, columns, rows, columns)
    moved = by_cell[1:, 1:, 1:, 1:]
    torch.testing.assert_close(moved, by_cell[:-1, :-1, :-1, :-1], atol=1e-5, rtol=1e-5)
    right, down = by_cell[0, 0, 0, 1], by_cell[0, 0, 1, 0]
    assert (right - by_cell[0, 0, 0, 0]).abs() > 1e-2
    assert (right - down).abs() > 1e-2


def test_rope_keeps_lengths_and_leaves_cls_alone():
    shape = TokenShape((3, 3), True, 1)
    x = torch.randn(2, shape.tokens, 3, 8)
    rotated = rotate(x, rope_table(shape, 8))
    torch.testing.assert_close(rotated[:, 0], x[:, 0])
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert not torch.allclose(rotated[:, 2:], x[:, 2:])


def test_rope_turns_half_the_pairs_with_the_row_and_half_with_the_column():
    table = rope_table(TokenShape((3, 2), False, 1), 8)[:, :, 0].view(2, 3, 2, 8)
    for pair in (0, 4), (1, 5):
        assert torch.equal(table[:, :, 0, pair], table[:, :, 1, pair])
    for pair in (2, 6), (3, 7):
        assert torch.equal(table[:, 0, :, pair], table[:, 2, :, pair])


def test_rope_lays_a_coarse_grid_over_a_fine_one():
    fine, coarse = TokenShape((4, 4), False, 1), TokenShape((2, 2), False, 1)
    angles = rope_table(coarse, 8, extent=(4, 4))[:, :, 0]
    assert torch.equal(rope_table(fine, 8), rope_table(fine, 8, extent=(4, 4)))
    # Fastest row pair, frequency 1: the centres of the coarse cells are at rows 0.5 and 2.5.
    torch.testing.assert_close(angles[0, :, 0], torch.tensor([0.5, 0.5, 2.5, 2.5]).cos())


def test_rotation_commutes_with_dtype():
    x = torch.randn(1, 6, 2, 8)
    table = rope_table(TokenShape((2, 3), False, 1), 8)
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16
    torch.testing.assert_close(
        rotate(x.bfloat16(), table).float(), rotate(x, table), atol=4e-2, rtol=0
    )


def test_grouped_queries_equal_repeated_keys_and_values():
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 5, 6, 8), torch.randn(2, 7, 2, 8), torch.randn(2, 7, 2, 8)
    keys, values = (x.repeat_interleave(3, 2).transpose(1, 2) for x in (k, v))
    weights = (q.transpose(1, 2) @ keys.transpose(-1, -2) / 8**0.5).softmax(-1)
    expected = (weights @ values).transpose(1, 2).reshape(2, 5, 48)
    torch.testing.assert_close(attend(q, k, v), expected, atol=1e-5, rtol=1e-5)


def test_self_attention_without_positions_ignores_the_order():
    torch.manual_seed(0)
    layer, x, order = SelfAttention(32, 4, 2), torch.randn(2, 6, 32), torch.randperm(6)
    torch.testing.assert_close(layer(x[:, order], None), layer(x, None)[:, order])
    rope = rope_table(TokenShape((2, 3), False, 1), 8)
    assert not torch.allclose(layer(x[:, order], rope), layer(x, rope)[:, order], atol=1e-3)


def test_query_key_norm_makes_attention_blind_to_their_scale():
    torch.manual_seed(0)
    layer, x = SelfAttention(32, 4, 2), torch.randn(2, 6, 32)
    before = layer(x, None)
    layer.qkv.weight.data[:48] *= 100
    torch.testing.assert_close(layer(x, None), before, atol=1e-4, rtol=1e-4)


def test_swiglu_is_its_formula():
    layer, x = SwiGLU(4, 6), torch.randn(2, 3, 4)
    gate, up = layer.gate_up.weight.split(6)
    expected = (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T
    torch.testing.assert_close(layer(x), expected)


def test_gelu_mlp_is_its_formula():
    layer, x = GELUMLP(4, 6), torch.randn(2, 3, 4)
    hidden = x @ layer.up.weight.T + layer.up.bias
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layer(x), hidden @ layer.down.weight.T + layer.down.bias)


def test_deep_adapter_is_linear_when_its_gate_is_shut():
    torch.manual_seed(0)
    adapter, c = DeepAdapter(6, 8, depth=3, dropout=0.0), torch.randn(2, 5, 6)
    added = adapter(c) - adapter.linear(c)
    torch.nn.init.constant_(adapter.gate, -50)
    torch.testing.assert_close(adapter(c), adapter.linear(c))
    torch.nn.init.constant_(adapter.gate, 50)
    torch.testing.assert_close(
        added, 0.0998 * (adapter(c) - adapter.linear(c)), atol=1e-4, rtol=1e-3
    )


def test_sinusoids_of_a_thousand_times_t():
    features = sinusoid(torch.tensor([0.0, 0.25, 1.0]), 6)
    angles = 1000 * torch.tensor([[0.0], [0.25], [1.0]]) * 10_000.0 ** -(torch.arange(3) / 3)
    torch.testing.assert_close(
        features, torch.cat((angles.cos(), angles.sin()), 1), atol=1e-4, rtol=0
    )


def test_time_embedding_takes_the_dtype_of_its_weights_and_keeps_times_apart():
    embed = TimeEmbedding(16)
    # bf16 holds 0.5 and 0.501 as one number: the sinusoids must be fp32 before the cast.
    t = torch.tensor([0.5, 0.501])
    assert embed.bfloat16()(t).dtype == torch.bfloat16
    near = embed(t)
    assert (near[0] - near[1]).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gated_product_and_its_gradient_are_those_of_its_parts_to_the_bit(dtype):
    torch.manual_seed(0)
    joint = torch.randn(2, 5, 16).to(dtype).requires_grad_()
    gradient = torch.randn(2, 5, 8).to(dtype)
    gate, up = joint.chunk(2, -1)
    plain, made = F.silu(gate) * up, gated_product(joint)
    assert torch.equal(made, plain)
    assert torch.equal(gated_product(joint.detach()), plain)
    expected, found = (torch.autograd.grad(out, joint, gradient)[0] for out in (plain, made))
    assert torch.equal(found, expected)
