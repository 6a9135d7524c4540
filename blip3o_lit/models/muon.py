"""Muon: the momentum of a matrix, orthogonalised, is its step (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon/. Steps are scaled to the size of AdamW's, 0.2
sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982). Blocks repeat their matrices, so those
of one shape are orthogonalised together, in fewer kernels than torch's own Muon takes.

Shape suffixes: S matrices of a stack, I rows, J columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)

from blip3o_lit.models.initialisation import is_sharded
from blip3o_lit.models.precision import bf16_is_faster

# Of the quintic iteration, as Jordan chose them.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
LEAST_NORM = 1e-7
STACK_ELEMENTS = 1 << 26
"""Numbers in one stack at most; a step takes ten bytes for each."""


def orthogonalised(x: Tensor) -> Tensor:
    """Set the singular values of [I, J] or of a stack [S, I, J] to about 1, in bf16 where fast."""
    products = torch.bfloat16 if bf16_is_faster(x.device.type) else torch.float32
    tall = x.shape[-2] > x.shape[-1]
    a, b, c = COEFFICIENTS
    y = (x.mT if tall else x).to(products, copy=True)
    if not is_sharded(y):
        y = y.contiguous()
    y = y.div_(y.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM))
    fused = torch.addmm if y.ndim == 2 else torch.baddbmm
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = fused(y, fused(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def stacks(parameters: list[Tensor], elements: int = STACK_ELEMENTS) -> Iterator[list[Tensor]]:
    """Yield parameters of one shape together, so many elements at most; a sharded one alone."""
    by_shape: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        key = id(parameter) if is_sharded(parameter) else parameter.shape
        by_shape.setdefault(key, []).append(parameter)
    for group in by_shape.values():
        most = max(1, elements // group[0].numel())
        yield from (group[i : i + most] for i in range(0, len(group), most))


@torch.no_grad()
def muon_step(group: dict[str, Any], state: dict[Any, Any], found_inf: Tensor | None) -> None:
    """Step the matrices of an optimizer's group that have a gradient.

    Where `found_inf` is 1 nothing moves, without waiting for the device.
    """
    rate, momentum = group["lr"], group["momentum"]
    moves = 1.0 if found_inf is None else 1.0 - found_inf
    moving = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in moving:
        if "momentum_buffer" not in state[parameter]:
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for stack in stacks(moving):
        gradients = [parameter.grad for parameter in stack if parameter.grad is not None]
        buffers = [state[parameter]["momentum_buffer"] for parameter in stack]
        if found_inf is not None:
            # The momentum as its own gradient: the average of the two is the momentum.
            skipped = found_inf.bool()
            gradients = [torch.where(skipped, b, g) for b, g in zip(buffers, gradients)]
        _foreach_lerp_(buffers, gradients, 1 - momentum)
        steps = _foreach_lerp(gradients, buffers, momentum)
        del gradients  # A stack is large: each is let go as soon as the next is made of it.
        whole = steps[0] if len(stack) == 1 else torch.stack(steps)
        del steps
        updates = orthogonalised(whole).float()
        del whole
        updates.mul_(-0.2 * math.sqrt(max(stack[0].shape)) * rate * moves)
        _foreach_mul_(stack, 1 - rate * group["weight_decay"] * moves)
        _foreach_add_(stack, [updates] if len(stack) == 1 else list(updates.unbind()))
