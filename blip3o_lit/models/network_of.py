"""The network that a configuration names."""

from __future__ import annotations

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config import registry as register
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.dit import DiT
from blip3o_lit.models.network import Network
from blip3o_lit.models.nextdit import NextDiT


def build_network(config: ModelConfig, shape: PairShape) -> Network:
    """Build the network of `model.architecture` for a pair of token shapes.

    Raises:
        UserError: If the network cannot join these two shapes.
    """
    own: dict[str, type[Network]] = {"dit": DiT, "nextdit": NextDiT}
    if config.architecture in own:
        return own[config.architecture](config, shape)
    network = register.network.build(config.architecture, config, shape)
    if not isinstance(network, Network):
        raise UserError(f"model.architecture={config.architecture} is no models.network.Network")
    if config.second_time and network.span is None:
        raise UserError(
            f"model.architecture={config.architecture} takes no second time: set flow.pairs=0"
        )
    return network
