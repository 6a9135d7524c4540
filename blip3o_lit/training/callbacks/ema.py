"""Exponential moving average of the weights, in fp32, as part of the module's own state.

The average is a second copy of the network inside the module (`module.ema`), so checkpoints hold it
like any weight, sharded strategies shard it, and validation runs it without swapping anything.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """Move each averaged weight towards the network's: average += (1 - decay) (weight - average).

    Args:
        average: Holds the fp32 averages; same parameter names as `network`.
        network: The trained network.
        decay: Share of the old average that is kept.
    """
    targets = [_local(parameter) for parameter in average.parameters()]
    sources = [_local(parameter).float() for parameter in network.parameters()]
    torch._foreach_lerp_(targets, sources, 1.0 - decay)  # pyright: ignore[reportPrivateImportUsage]


def _local(parameter: Tensor) -> Tensor:
    """Return this rank's part of a sharded parameter, or the parameter itself."""
    to_local = getattr(parameter, "to_local", None)
    return parameter.data if to_local is None else to_local().data


def ramped_decay(decay: float, step: int) -> float:
    """Return min(decay, (1 + step) / (10 + step)), so that short runs forget their start."""
    return min(decay, (1 + step) / (10 + step))


class EmaUpdate(Callback):
    """Updates `module.ema` after each optimizer step."""

    def __init__(self, decay: float) -> None:
        """Keep the final decay."""
        self.decay = decay
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the step that training starts from."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average, once an optimizer step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        update_average(
            pl_module.ema,  # type: ignore[arg-type]
            pl_module.network,  # type: ignore[arg-type]
            ramped_decay(self.decay, self._step),
        )
