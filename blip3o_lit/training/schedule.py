"""The learning rate of each step: a linear warm-up, then the decay of `optimizer.schedule`."""

from __future__ import annotations

import math
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

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


def settings_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return what each group of an optimizer was built with: peak rate, decay, moments."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def adopt_settings(schedule: LambdaLR, settings: list[dict[str, Any]]) -> None:
    """Set the groups of a schedule's optimizer to settings, at the step that the schedule is at."""
    schedule.base_lrs = [own["lr"] for own in settings]
    for group, own, factor in zip(
        schedule.optimizer.param_groups, settings, schedule.lr_lambdas, strict=True
    ):
        rate = own["lr"] * factor(schedule.last_epoch)
        group |= own | {"lr": rate, "initial_lr": own["lr"]}
