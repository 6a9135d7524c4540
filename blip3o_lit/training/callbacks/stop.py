"""Stopping in an orderly way: Ctrl-C and a scheduler's signals end the run at a whole step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopAtStep(Callback):
    """Turns a signal into `trainer.should_stop` after the optimizer step in progress.

    All processes agree on the step, so a signal that reaches one of them stops all: the flag goes
    round in the background, apart from the device, and is read a step later. The checkpoint of that
    step is the business of `training/callbacks/checkpoints.py`, which sees `should_stop`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._group: Any = None
        self._asked: tuple[Any, torch.Tensor] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
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
        for number in SIGNALS:  # Lightning has installed its own handlers by now
            signal.signal(number, self._handle)
        if trainer.world_size > 1:
            timeout = trainer.strategy._timeout  # type: ignore[union-attr]
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        stop = self.received is not None
        if self._group is not None:
            stop = self._answer()
            flag = torch.tensor([self.received is not None], dtype=torch.int32)
            work = dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, async_op=True)
            self._asked = (work, flag)
        if stop:
            trainer.should_stop = True
            self.received = self.received or signal.SIGTERM  # another rank's

    def _answer(self) -> bool:
        """Whether any rank had a signal when all were asked last."""
        if self._asked is None:
            return False
        (work, flag), self._asked = self._asked, None
        work.wait()
        return bool(flag)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._group is not None:
            self._answer()
            dist.destroy_process_group(self._group)
            self._group = None
