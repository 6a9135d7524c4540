"""The most that this machine gives at a network's own shapes: products, and passes over memory."""

from __future__ import annotations

import torch

from benchmarks.timing import interleaved
from blip3o_lit.config.model import ModelConfig


def matmul_flops(model: ModelConfig, tokens: int, dtype: torch.dtype, rounds: int = 9) -> float:
    """Return FLOP/s of the products that a block does most, forward alone, median.

    Args:
        model: Gives width and mlp_width.
        tokens: Rows of the products: batch times tokens.
        dtype: Number format.
        rounds: Timed rounds.
    """
    pairs = [(model.width, model.width), (model.width, model.mlp_width)]
    pairs += [(model.mlp_width, model.width)]
    rows = [torch.randn(tokens, inner, dtype=dtype) for inner, _ in pairs]
    matrices = [torch.randn(outer, inner, dtype=dtype) for inner, outer in pairs]

    def products() -> None:
        for x, weight in zip(rows, matrices):
            torch.nn.functional.linear(x, weight)

    flops = 2 * tokens * sum(inner * outer for inner, outer in pairs)
    return flops / interleaved({"products": products}, rounds=rounds)["products"]


def addition_bytes(model: ModelConfig, tokens: int, dtype: torch.dtype, rounds: int = 9) -> float:
    """Return bytes/s of adding two activations into a third, the median; arguments as above."""
    left, right, out = (torch.randn(tokens, model.width).to(dtype) for _ in range(3))

    def additions() -> None:
        for _ in range(50):
            torch.add(left, right, out=out)

    moved = 50 * 3 * out.numel() * out.element_size()
    return moved / interleaved({"additions": additions}, rounds=rounds)["additions"]
