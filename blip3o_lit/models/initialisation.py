"""Start values that are a function of (seed, parameter name), whatever the layout of the weights.

A sharded network can't be drawn in one stream: each process holds a slice of every parameter. So
each parameter has a stream of its own and is drawn whole, one at a time, on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

Draw = Callable[[Tensor, torch.Generator], object]
"""Fills a whole parameter in place."""
Rules = dict[str, float | Draw]
"""By parameter name: the number it is filled with, or how it is drawn."""


def xavier(whole: Tensor, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(whole, generator=generator)


def narrow_normal(whole: Tensor, generator: torch.Generator) -> None:
    nn.init.normal_(whole, std=0.02, generator=generator)


def rules_of_layers(network: nn.Module) -> Rules:
    """Return Xavier-uniform matrices, zero biases and norm weights of one, for every layer."""
    rules: Rules = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, nn.Linear):
            rules[f"{prefix}weight"] = xavier
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            rules[f"{prefix}weight"] = 1.0
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            rules[f"{prefix}bias"] = 0.0
    return rules


@torch.no_grad()
def apply_rules(network: nn.Module, rules: Mapping[str, float | Draw], seed: int) -> None:
    """Set every parameter, or this process's shard of it; those on the meta device are left.

    Raises:
        KeyError: If a parameter has no rule.
    """
    generator = torch.Generator()
    for name, parameter in network.named_parameters():
        rule = rules[name]
        if parameter.is_meta:
            continue
        if not callable(rule):
            parameter.fill_(rule)
            continue
        word = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]
        generator.manual_seed(int.from_bytes(word, "little"))
        whole = torch.empty(parameter.shape, device="cpu", dtype=torch.float32)
        rule(whole, generator)
        parameter.copy_(shard_like(whole, parameter))


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: this process holds its slice of it."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, or the tensor itself, without its history."""
    to_local = getattr(tensor, "to_local", None)
    return tensor.detach() if to_local is None else to_local().detach()


def shard_like(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor in the layout of a parameter: its own slice where that is sharded."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import DTensor, distribute_tensor  # a second for every command

    assert isinstance(parameter, DTensor)
    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
