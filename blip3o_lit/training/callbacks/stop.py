"""Stopping in an orderly way: Ctrl-C and a scheduler's signals end the run at a whole step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopAtStep(Callback):
    """Turns a signal into `trainer.should_stop` after the optimizer step in progress.

    All processes agree on the step, so a signal that reaches one of them stops all. The checkpoint
    of that step is the business of `training/callbacks/checkpoints.py`, which sees `should_stop`.
    """

    def __init__(self) -> None:
        """Nothing received yet."""
        self.received: int | None = None
        self._step = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen from now on; put the handlers that were there back after a fit."""
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if number == signal.SIGINT:
            print("\nstopping after this step; press Ctrl-C again to stop at once", flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers again, now that Lightning has installed its own."""
        for number in SIGNALS:
            signal.signal(number, self._handle)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop at a step's end if any process received a signal."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        wanted = self.received is not None
        if trainer.world_size > 1:
            wanted = trainer.strategy.reduce_boolean_decision(wanted, all=False)
            if wanted and self.received is None:
                self.received = signal.SIGTERM
        if wanted:
            trainer.should_stop = True
