"""Norm layers: the formula, derivatives of each kind, the dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.models.layers import rope_table
from blip3o_lit.models.norms import RMSNorm, modulate, rms_norm, rotate


def doubles(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_norms_have_first_and_second_and_forward_mode_derivatives():
    torch.manual_seed(0)
    x, scale, shift = doubles(2, 3, 8), doubles(2, 1, 8), doubles(2, 1, 8)

    def norm(x, shift, scale):
        return modulate(x, shift, scale, eps=1e-2)

    assert torch.autograd.gradcheck(norm, (x, shift, scale), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(norm, (x, shift, scale))


def test_a_weight_inside_the_kernel_changes_no_bit_of_fp32():
    torch.manual_seed(0)
    x, weight, gradient = torch.randn(2, 9, 3, 8), torch.rand(8) + 0.5, torch.randn(2, 9, 3, 8)

    def value_and_gradients(norm):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        out = norm(*leaves)
        return out, *torch.autograd.grad(out, leaves, gradient)

    within = value_and_gradients(lambda x, weight: rms_norm(x, 1e-2, weight))
    apart = value_and_gradients(lambda x, weight: rms_norm(x, 1e-2) * weight)
    assert all(torch.equal(a, b) for a, b in zip(within, apart))


def test_the_rotation_is_undone_by_the_opposite_one_and_so_is_its_gradient():
    rope = rope_table(TokenShape((2, 2), True, 1), 8).double()
    opposite = rope * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
    x, gradient = doubles(2, 5, 3, 8), torch.randn(2, 5, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(rotate(rotate(x, rope), opposite), x)
    (found,) = torch.autograd.grad(rotate(x, rope), x, gradient)
    torch.testing.assert_close(found, rotate(gradient, opposite))


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
