"""What a tower costs, before it is downloaded: parameters and arithmetic, from its shapes alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.tower import TowerInfo


@dataclass(frozen=True)
class TowerCost:
    """Size of a tower and work of one image."""

    info: TowerInfo
    parameters: int
    """Weights, those of a text side included."""
    flops: int
    """Floating-point operations of one image's matrix products; a multiply-add is 2."""


def tower_cost(config: TowerConfig) -> TowerCost:
    """Build a tower on the meta device and count; reads and downloads no weights.

    Raises:
        UserError: If the model is unknown, or only the hub knows its shapes and can't be reached.
    """
    tower = load_tower(config, device="meta")
    size = tower.info.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tower.tokens(torch.zeros(1, 3, size, size, device="meta"))
    parameters = sum(parameter.numel() for parameter in tower.parameters())
    return TowerCost(tower.info, parameters, counter.get_total_flops())
