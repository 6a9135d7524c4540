"""What a tower costs, before it is downloaded: parameters and arithmetic, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.towers.tower import Tower


@dataclass(frozen=True)
class TowerCost:
    """Size of a tower and work of one image."""

    parameters: int
    """Weights, those of a text side included."""
    bytes: int
    """Memory of the weights in the tower's precision."""
    flops: int
    """Floating-point operations of one image's matrix products; a multiply-add is 2."""


def tower_cost(tower: Tower) -> TowerCost:
    """Count a tower that was loaded on the `meta` device; nothing is computed."""
    size = tower.info.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tower.tokens(torch.zeros(1, 3, size, size, device="meta"))
    parameters = list(tower.parameters())
    return TowerCost(
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        counter.get_total_flops(),
    )
