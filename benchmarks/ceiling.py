"""The most that this machine gives at a network's own shapes: products, and passes over memory.

Both are work to be timed in turn with what they are held against: a virtual machine's neighbours
can halve either from one second to the next.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from blip3o_lit.config.model import ModelConfig

Work = tuple[Callable[[], None], float]
"""What is timed, and the amount of work that one call does."""
REPEATS = 10
"""Of each product in one call: long enough to be at the speed of a step."""


def products(model: ModelConfig, tokens: int, dtype: torch.dtype) -> Work:
    """Return the products that a block does most, forward alone, and their FLOPs.

    Args:
        model: Gives width and mlp_width.
        tokens: Rows of the products: batch times tokens.
        dtype: Number format.
    """
    pairs = [(model.width, model.width), (model.width, model.mlp_width)]
    pairs += [(model.mlp_width, model.width)]
    rows = [torch.randn(tokens, inner, dtype=dtype) for inner, _ in pairs]
    matrices = [torch.randn(outer, inner, dtype=dtype) for inner, outer in pairs]

    def work() -> None:
        for _ in range(REPEATS):
            for x, weight in zip(rows, matrices):
                torch.nn.functional.linear(x, weight)

    return work, REPEATS * 2.0 * tokens * sum(inner * outer for inner, outer in pairs)


def additions(model: ModelConfig, tokens: int, dtype: torch.dtype) -> Work:
    """Return additions of two activations into a third, and their bytes; arguments as above."""
    left, right, out = (torch.randn(tokens, model.width).to(dtype) for _ in range(3))

    def work() -> None:
        for _ in range(50):
            torch.add(left, right, out=out)

    return work, 50.0 * 3 * out.numel() * out.element_size()
