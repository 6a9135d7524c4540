"""Products of the blocks in float8, by torchao; weights and checkpoints stay as they are.

Inputs, weights and gradients are scaled to 8 bits by their largest number at each product
(Micikevicius et al. 2022, arXiv:2209.05433).
"""

from __future__ import annotations

from torch import nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.models.network import Network

MULTIPLE = 16
"""Rows and columns that the kernels ask for; other layers are left in bf16."""


def float8_blocks(network: Network, emulate: bool = False) -> None:
    """Replace the linear layers of the blocks in place, before they are compiled or sharded.

    Args:
        network: Its parameters keep their names.
        emulate: Round as float8 does and multiply in the layers' own format, on any device.
    """
    try:
        from torchao.float8 import (  # pyright: ignore[reportMissingImports]
            Float8LinearConfig,
            convert_to_float8_training,
        )
    except ImportError as error:
        line = "precision.float8=true needs torchao: pip install 'blip3o-lit[fp8]'"
        raise UserError(line) from error

    def fits(layer: nn.Module, name: str) -> bool:
        return all(size % MULTIPLE == 0 for size in layer.weight.shape)  # type: ignore[union-attr]

    config = Float8LinearConfig(emulate=emulate)
    for block in network.blocks:
        convert_to_float8_training(block, config=config, module_filter_fn=fits)
