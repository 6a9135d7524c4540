"""The gated feed-forward's product silu(gate) * up, with a CPU path that copies nothing.

Shape suffixes: B batch, N tokens, F feed-forward width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def silu_product(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [..., F], of gate and up side by side, [..., 2 F].

    On a CPU the backward pass writes both gradients into one tensor, where autograd would join two;
    the numbers are the same to the last bit.
    """
    if gate_up.device.type == "cpu" and not torch.compiler.is_compiling():
        return _SiluProduct.apply(gate_up)  # type: ignore[return-value]
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class _SiluProduct(torch.autograd.Function):
    """Keeps its input and silu(gate) for the backward pass, as autograd does."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        (gradient,) = gradients
        gate, up = gate_up.chunk(2, -1)
        joint = torch.empty_like(gate_up)
        by_gate, by_up = joint.chunk(2, -1)
        torch.mul(gradient, activated, out=by_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=by_gate)
        return joint
