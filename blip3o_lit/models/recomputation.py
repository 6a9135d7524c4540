"""What a block keeps for its backward pass, and what it computes again there.

Selective activation recomputation (Korthikanti et al. 2022, arXiv:2205.05198): the results of
matrix products and of attention are dear to compute, those of all else are cheap.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

aten = torch.ops.aten
PRODUCTS = (aten.mm.default, aten.addmm.default, aten._scaled_mm.default)
ATTENTION = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def recomputed(block: Callable[..., Any], budget: float, *inputs: Any) -> Any:
    """Call a block that keeps its inputs, attention's results and the share `budget` of products'.

    With a budget of 0 it keeps its inputs alone.
    """
    if not budget:
        return checkpoint(block, *inputs, use_reentrant=False)
    contexts = partial(create_selective_checkpoint_contexts, _policy(budget))
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


def _policy(budget: float) -> Callable[..., CheckpointPolicy]:
    """Return what is asked at each operation of one forward pass, and again as it is repeated."""
    met = {True: 0, False: 0}

    def keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        kept = operation in ATTENTION
        if operation in PRODUCTS:  # the kept ones are spread evenly
            number = met[context.is_recompute]
            met[context.is_recompute] = number + 1
            kept = int((number + 1) * budget) > int(number * budget)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return keep
