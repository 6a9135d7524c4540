"""The network that a configuration names."""

from __future__ import annotations

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.dit import DiT
from blip3o_lit.models.network import Network
from blip3o_lit.models.nextdit import NextDiT


def build_network(config: ModelConfig, shape: PairShape) -> Network:
    """Build the network of `model.architecture` for a pair of token shapes.

    Raises:
        UserError: If the network cannot join these two shapes.
    """
    return {"dit": DiT, "nextdit": NextDiT}[config.architecture](config, shape)
