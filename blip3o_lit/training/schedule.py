"""The learning rate of each step: a linear warm-up, then the decay of `optimizer.schedule`."""

from __future__ import annotations

import math

from blip3o_lit.config.optimizer import OptimizerConfig


def learning_rate_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Return the learning rate of a step as a fraction of the peak: warm-up, then decay."""
    warmup = min(config.warmup_steps, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if config.schedule == "linear":
        remaining = 1.0 - progress
    else:
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * remaining
