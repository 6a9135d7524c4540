"""Where a rank is when it hangs or crashes: the lines of its threads, in the folder of the run."""

from __future__ import annotations

import faulthandler
from pathlib import Path
from typing import Any, TextIO

from lightning import Callback, LightningModule, Trainer


class Stacks(Callback):
    """Writes the stacks of a rank that ends no micro-batch for some seconds, or that crashes.

    The files of ranks that never do are removed at the end.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds
        self._file: TextIO | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = (self.folder / f"rank-{trainer.global_rank}.txt").open("w")
        faulthandler.enable(self._file)
        self._watch()

    def _watch(self, *args: Any, **kwargs: Any) -> None:
        if self._file is not None:
            faulthandler.dump_traceback_later(self.seconds, file=self._file)

    on_train_batch_end = on_validation_batch_end = _watch

    def _end(self, *args: Any, **kwargs: Any) -> None:
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self._file.close()
        path, self._file = Path(self._file.name), None
        if path.stat().st_size == 0:
            path.unlink()

    on_train_end = on_exception = _end
