"""Bytes of what lasts from step to step: weights, gradients, optimizer, average; by strategy."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import MUON_LAYERS, OptimizerConfig
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import muon_matrices
from blip3o_lit.models.precision import Precision


@dataclass(frozen=True)
class Units:
    """Parameters of a network, as FSDP2 shards it, and its arithmetic."""

    total: int
    largest: int
    """Of the largest part that is gathered at once: a block, or the modulation matrix."""
    rest: int
    """Outside those parts; gathered during the whole pass."""
    muon: Mapping[str, int]
    """In the matrices that Muon steps, by optimizer.muon_layers."""
    forward_flops: int
    """Of one image."""


@lru_cache(maxsize=64)
def units(model: ModelConfig, shape: PairShape) -> Units:
    with torch.device("meta"):  # no memory
        network = build_network(model, shape)

    def count(module: nn.Module | None) -> int:
        return 0 if module is None else sum(p.numel() for p in module.parameters())

    parts = [count(part) for part in (*network.blocks, getattr(network, "modulation", None))]
    muon = {
        layers: sum(matrix.numel() for matrix in muon_matrices(network, layers).values())
        for layers in MUON_LAYERS
    }
    total, flops = count(network), network.forward_flops()
    return Units(total, max(parts), total - sum(parts), muon, flops)


@dataclass(frozen=True)
class States:
    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def saved(self) -> int:
        """What a checkpoint holds."""
        return self.weights + self.optimizer + self.average

    @property
    def total(self) -> int:
        return self.saved + self.gradients


def states(counts: Units, precision: Precision, optimizer: OptimizerConfig) -> States:
    """Return the bytes of a whole network's states.

    AdamW's two moments, and Muon's one, have the weights' format; the averages are fp32.
    """
    size = precision.weights.itemsize
    once = counts.muon[optimizer.muon_layers] if optimizer.name == "muon" else 0
    moments = 2 * counts.total - once
    averages = 4 * counts.total * (1 + len(optimizer.ema_profiles))
    return States(size * counts.total, size * counts.total, size * moments, averages)


def gathered_bytes(counts: Units, precision: Precision) -> int:
    """Return what FSDP2 holds beside its shards: weights in use, those on their way, gradients.

    The rest of the network stays gathered, with one part in use and the next one coming; the
    gradient of one part waits whole to be summed in fp32.
    """
    size = precision.products.itemsize
    return size * (counts.rest + 2 * counts.largest) + (size + 4) * counts.largest


def rank_bytes(
    strategy: str,
    counts: Units,
    precision: Precision,
    optimizer: OptimizerConfig,
    world: int,
    accumulated: bool = False,
) -> int:
    """Return the bytes of the states on one process.

    `world` processes share what is sharded. With several micro-batches per step (`accumulated`),
    DDP sums gradients beside the buckets that it sends, and FSDP2 sums whole ones, in fp32, until
    the last.
    """
    whole = states(counts, precision, optimizer)
    if strategy == "fsdp2":
        gradients = 4 * counts.total if accumulated else 0
        return whole.total // world + gathered_bytes(counts, precision) + gradients
    if strategy == "ddp" and accumulated:
        return whole.total + whole.gradients
    return whole.total
