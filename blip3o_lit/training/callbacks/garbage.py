"""Collections of garbage at the same steps on all ranks: at their own, each would make all wait."""

from __future__ import annotations

import gc
from typing import Any

from lightning import Callback, LightningModule, Trainer

STEPS = 500


class Garbage(Callback):
    """Collects every `STEPS` steps, and not in between."""

    def on_train_start(self, *args: Any, **kwargs: Any) -> None:
        gc.disable()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % (STEPS * trainer.accumulate_grad_batches) == 0:
            gc.collect(1)

    def _end(self, *args: Any, **kwargs: Any) -> None:
        gc.enable()

    on_train_end = on_exception = _end
