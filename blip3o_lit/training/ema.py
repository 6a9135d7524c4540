"""Running averages of the weights, in fp32, as part of the module's own state.

Each average is a second copy of the network inside the module (`module.ema`, `module.profiles`), so
checkpoints hold it like any weight, sharded strategies shard it, and validation runs the first
without swapping anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from blip3o_lit.models.initialisation import local


@torch.no_grad()
def update_averages(
    averages: Sequence[nn.Module], network: nn.Module, decays: Sequence[float]
) -> None:
    """Average += (1 - decay) (weight - average), for modules with the same parameter names."""
    weights = [local(parameter).float() for parameter in network.parameters()]
    for average, decay in zip(averages, decays):
        own = [local(parameter) for parameter in average.parameters()]
        torch._foreach_lerp_(own, weights, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]


def ramped_decay(decay: float, step: int) -> float:
    """Return a decay with which short runs forget their start."""
    return min(decay, (1 + step) / (10 + step))
