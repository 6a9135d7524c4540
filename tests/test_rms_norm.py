"""Norms: the formula, the hand-written gradient, the dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blip3o_lit.config.shape import TokenShape
from blip3o_lit.models.layers import rope_table
from blip3o_lit.models.rms_norm import RMSNorm, modulate, rotated, rotated_rms_norm, scaled_rms_norm


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradients_of_norm_scale_and_shift_are_right():
    torch.manual_seed(0)
    x, scale, shift = doubles(2, 3, 8), doubles(2, 1, 8), doubles(2, 1, 8)
    assert torch.autograd.gradcheck(lambda *a: scaled_rms_norm(*a, 1e-2), (x, scale, shift))
    for shape in ((8,), (1, 1, 8), (1, 3, 8), (2, 3, 8)):
        assert torch.autograd.gradcheck(
            lambda a, b: scaled_rms_norm(a, b, None, 1e-2), (x, doubles(*shape))
        )


def test_a_second_derivative_is_refused_not_wrong():
    x = doubles(2, 3, 8)
    (by_x,) = torch.autograd.grad(
        scaled_rms_norm(x, doubles(8), None, 1e-2).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        by_x.sum().backward()


def test_norm_and_rotation_in_one_are_the_two_in_turn_with_right_gradients():
    torch.manual_seed(0)
    rope = rope_table(TokenShape((2, 2), True, 1), 8).double()
    x, weight = doubles(2, 5, 3, 8), doubles(3, 8)
    in_turn = rotated(scaled_rms_norm(x, weight, None, 1e-2), rope)
    torch.testing.assert_close(rotated_rms_norm(x, weight, rope, 1e-2), in_turn)
    assert torch.autograd.gradcheck(lambda *a: rotated_rms_norm(*a, rope, 1e-2), (x, weight))
    torch.testing.assert_close(
        rotated_rms_norm(x, weight[0], None, 1e-2), scaled_rms_norm(x, weight[0], None, 1e-2)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_its_formula_and_keeps_the_dtype(dtype):
    torch.manual_seed(0)
    norm, x = RMSNorm(8, eps=1e-3), 5 * torch.randn(3, 8)
    norm.weight.data.uniform_(0.5, 2)
    y = norm(x.to(dtype))
    assert y.dtype == dtype
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    wide = 3e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y.float(), expected, atol=wide, rtol=wide)
    torch.testing.assert_close(expected, F.rms_norm(x, (8,), norm.weight, 1e-3))


def test_modulate_is_its_formula():
    x, shift, scale = torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(modulate(x, shift, scale), normed * (1 + scale) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulate_by_layer_norm_is_its_formula_and_keeps_the_dtype(dtype):
    x, shift, scale = 3 + torch.randn(2, 3, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    made = modulate(x.to(dtype), shift.to(dtype), scale.to(dtype), "layer")
    assert made.dtype == dtype
    wide = 5e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(made.float(), normed * (1 + scale) + shift, atol=wide, rtol=wide)
