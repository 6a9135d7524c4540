"""Weights in the format that products are computed in, cast once and not at every evaluation."""

from __future__ import annotations

import torch
from torch import nn

from blip3o_lit.models.layers import ImageLinear


def follow_autocast(network: nn.Module) -> None:
    """Let a network on a CPU treat its weights as on an accelerator: to autocast all are alike."""
    for layer in network.modules():
        if isinstance(layer, ImageLinear):
            layer.follows_autocast = True


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear layers in place, as autocast would at each of their calls.

    Autocast keeps a cast weight only while it can get a gradient, so a network without gradients
    casts all of them at every evaluation of every solver step. The numbers stay the same to the
    last bit, and the weights take half of the memory; on a CPU two thirds, for autocast leaves the
    layers of one row an image alone there, and so does this.
    """
    for layer in network.modules():
        kept = isinstance(layer, ImageLinear) and layer.keeps_format
        if isinstance(layer, nn.Linear) and not kept:
            layer.to(dtype)
