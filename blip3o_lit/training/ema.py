"""Exponential moving average of the weights, in fp32, as part of the module's own state.

The average is a second copy of the network inside the module (`module.ema`), so checkpoints hold it
like any weight, sharded strategies shard it, and validation runs it without swapping anything.
"""

from __future__ import annotations

import torch
from torch import nn

from blip3o_lit.models.initialisation import local


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Average += (1 - decay) (weight - average), for modules with the same parameter names."""
    averages = [local(parameter) for parameter in average.parameters()]
    weights = [local(parameter).float() for parameter in network.parameters()]
    torch._foreach_lerp_(averages, weights, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]


def ramped_decay(decay: float, step: int) -> float:
    """Return a decay with which short runs forget their start."""
    return min(decay, (1 + step) / (10 + step))
