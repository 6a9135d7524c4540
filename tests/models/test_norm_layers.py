"""Norm layers: the formula, derivatives of each kind, the dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.models.layers import rope_table
from blip3o_lit.models.norms import RMSNorm, modulate, rotate, rotated_rms_norm


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_norms_have_first_and_second_and_forward_mode_derivatives():
    torch.manual_seed(0)
    x, scale, shift = doubles(2, 3, 8), doubles(2, 1, 8), doubles(2, 1, 8)

    def norm(x, shift, scale):
        return modulate(x, shift, scale, eps=1e-2)

    assert torch.autograd.gradcheck(norm, (x, shift, scale), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, (x, shift, scale))


def test_norm_and_rotation_in_one_are_the_two_in_turn():
    torch.manual_seed(0)
    rope = rope_table(TokenShape((2, 2), True, 1), 8).double()
    x, weight = doubles(2, 5, 3, 8), doubles(3, 8)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight
    torch.testing.assert_close(rotated_rms_norm(x, weight, rope, 1e-2), rotate(normed, rope))
    torch.testing.assert_close(rotated_rms_norm(x, weight, None, 1e-2), normed)


def test_autocast_leaves_norms_in_the_format_they_are_given():
    x, row = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 1, 8, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert RMSNorm(8)(x).dtype == torch.bfloat16
        assert modulate(x, row, row).dtype == torch.bfloat16


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
