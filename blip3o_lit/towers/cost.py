"""What a tower costs, before it is downloaded: parameters and arithmetic, from its shapes alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.towers.tower import Tower


class TowerCost(NamedTuple):
    parameters: int
    """Weights, those of a text side included."""
    bytes: int
    """Memory of the weights in the tower's precision."""
    flops: int
    """Floating-point operations per image, matrix products alone; a multiply-add is 2."""


def tower_cost(tower: Tower) -> TowerCost:
    """Count a tower that was loaded on the `meta` device; nothing is computed."""
    size = tower.info.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tower.tokens(torch.zeros(1, 3, size, size, device="meta"))
    weights = list(tower.parameters())
    return TowerCost(
        parameters=sum(weight.numel() for weight in weights),
        bytes=sum(weight.nbytes for weight in weights),
        flops=counter.get_total_flops(),
    )
