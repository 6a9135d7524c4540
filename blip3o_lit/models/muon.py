"""Muon: the momentum of a matrix, orthogonalised, is its step (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon/. Steps are scaled to the size of AdamW's, 0.2
sqrt(max(rows, columns)) (Liu et al. 2025, arXiv:2502.16982). Blocks repeat their matrices, so those
of one shape are orthogonalised together, in fewer kernels than torch's own Muon takes. Of sharded
ones each process gathers its part of the stack, whole matrices, and sends their rows back.

Shape suffixes: S matrices of a stack, I rows, J columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_lerp_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_mul_,  # pyright: ignore[reportPrivateImportUsage]
)

from blip3o_lit.models.initialisation import is_sharded, local
from blip3o_lit.models.precision import bf16_is_faster

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Of the quintic iteration, as Jordan chose them.
COEFFICIENTS, ROUNDS = (3.4445, -4.7750, 2.0315), 5
LEAST_NORM = 1e-7
STACK_ELEMENTS = 1 << 26
"""Numbers in one stack at most; a step takes ten bytes for each, sixteen in fp32."""


def products_format(x: Tensor) -> torch.dtype:
    return torch.bfloat16 if bf16_is_faster(x.device.type) else torch.float32


def orthogonalised(x: Tensor) -> Tensor:
    """Set the singular values of [I, J] or of a stack [S, I, J] to about 1, in bf16 where fast."""
    products = products_format(x)
    tall = x.shape[-2] > x.shape[-1]
    a, b, c = COEFFICIENTS
    y = (x.mT if tall else x).to(products, copy=True)
    y = y.contiguous()
    y = y.div_(y.norm(dim=(-2, -1), keepdim=True).clamp(min=LEAST_NORM))
    fused = torch.addmm if y.ndim == 2 else torch.baddbmm
    for _ in range(ROUNDS):
        gram = y @ y.mT
        y = fused(y, fused(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if tall else y


def stacks(parameters: list[Tensor], elements: int = STACK_ELEMENTS) -> Iterator[list[Tensor]]:
    """Yield parameters of one shape together, so many elements at most; sharded ones at once."""
    by_shape: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        by_shape.setdefault((parameter.shape, is_sharded(parameter)), []).append(parameter)
    for group in by_shape.values():
        most = max(1, elements // group[0].numel())
        most = len(group) if is_sharded(group[0]) else most
        yield from (group[i : i + most] for i in range(0, len(group), most))


def spread(steps: list[Tensor], parameter: DTensor) -> Tensor:
    """Orthogonalise the matrices of which each process has some rows, by two exchanges in all.

    Args:
        steps: This process's rows of each matrix.
        parameter: One of them, sharded by rows over one axis of its mesh.

    Returns:
        Its rows of the orthogonalised matrices, [S, rows, J].
    """
    mesh = parameter.device_mesh
    axis = next(i for i, place in enumerate(parameter.placements) if place.is_shard())
    assert parameter.placements[axis].is_shard(0), parameter.placements
    group, ranks, rank = mesh.get_group(axis), mesh.size(axis), mesh.get_local_rank(axis)
    height, width = parameter.shape
    most = -(-height // ranks)  # as torch.chunk cuts
    rows = [max(0, min(most, height - r * most)) for r in range(ranks)]
    shares = [len(steps) // ranks + (r < len(steps) % ranks) for r in range(ranks)]
    own = shares[rank]
    mine = [own * r * width for r in rows]  # numbers of my matrices that each process holds
    theirs = [share * rows[rank] * width for share in shares]  # that I hold of each one's
    sent = torch.stack(steps).to(products_format(steps[0])).flatten()
    parts = sent.new_empty(sum(mine))
    dist.all_to_all_single(parts, sent, mine, theirs, group)
    pieces = [part.view(own, r, width) for part, r in zip(parts.split(mine), rows)]
    whole = torch.cat(pieces, 1)
    at_once = max(1, STACK_ELEMENTS // (height * width))
    done = torch.cat([orthogonalised(part) for part in whole.split(at_once)])
    sent = torch.cat([part.flatten() for part in done.split(rows, 1)])
    parts = sent.new_empty(sum(theirs))
    dist.all_to_all_single(parts, sent, theirs, mine, group)
    return parts.view(len(steps), rows[rank], width)


@torch.no_grad()
def muon_step(group: dict[str, Any], state: dict[Any, Any], found_inf: Tensor | None) -> None:
    """Step the matrices of an optimizer's group that have a gradient.

    Where `found_inf` is 1 nothing moves, without waiting for the device.
    """
    rate, momentum = group["lr"], group["momentum"]
    found_inf = None if found_inf is None else local(found_inf)
    moves = 1.0 if found_inf is None else 1.0 - found_inf
    moving = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in moving:
        if "momentum_buffer" not in state[parameter]:
            state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    for stack in stacks(moving):
        gradients = [local(parameter.grad) for parameter in stack if parameter.grad is not None]
        buffers = [local(state[parameter]["momentum_buffer"]) for parameter in stack]
        weights = [local(parameter) for parameter in stack]
        if found_inf is not None:
            # The momentum as its own gradient: the average of the two is the momentum.
            skipped = found_inf.bool()
            gradients = [torch.where(skipped, b, g) for b, g in zip(buffers, gradients)]
        _foreach_lerp_(buffers, gradients, 1 - momentum)
        steps = _foreach_lerp(gradients, buffers, momentum)
        del gradients  # A stack is large: each is let go as soon as the next is made of it.
        if is_sharded(stack[0]):
            updates = spread(list(steps), cast("DTensor", stack[0])).float()
        else:
            whole = torch.stack(steps)
            del steps
            updates = orthogonalised(whole).float()
            del whole
        updates.mul_(-0.2 * math.sqrt(max(stack[0].shape)) * rate * moves)
        _foreach_mul_(weights, 1 - rate * group["weight_decay"] * moves)
        _foreach_add_(weights, list(updates.unbind()))
