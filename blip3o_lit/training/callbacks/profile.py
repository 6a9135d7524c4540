"""A trace of some steps, for chrome://tracing or Perfetto; on CUDA a snapshot of memory with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.profiler import profile


class Profile(Callback):
    """Traces rank 0 from one step to another into `folder`."""

    def __init__(self, folder: Path, first: int, last: int) -> None:
        self.folder, self.first, self.last = folder, first, last
        self._trace: profile | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._trace is None and trainer.global_step + 1 == self.first and trainer.is_global_zero:
            if torch.cuda.is_available():
                torch.cuda.memory._record_memory_history()
            self._trace = profile()
            self._trace.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trace is not None and trainer.global_step >= self.last:
            self._end()

    def _end(self, *args: Any, **kwargs: Any) -> None:
        if self._trace is None:
            return
        self._trace.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._trace.export_chrome_trace(str(self.folder / f"steps-{self.first}-{self.last}.json"))
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(None)
        self._trace, self.first = None, 0

    on_train_end = on_exception = _end
