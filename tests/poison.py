"""A callback that makes a gradient infinite at some steps, as a user's own callback would."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lightning import Callback, LightningModule, Trainer


class Poison(Callback):
    def __init__(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step + 1 in self.steps:
            next(pl_module.network.parameters()).grad[0] = torch.inf  # type: ignore[union-attr, index, operator]
