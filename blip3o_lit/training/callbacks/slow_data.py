"""Tells of a store that keeps training waiting."""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

from lightning import Callback

from blip3o_lit.base.units import human_time

log = logging.getLogger("blip3o_lit")


class SlowData(Callback):
    """Says so when a batch does not come; again when twice the time has passed.

    It is the last callback at a step's end, so that what the others do does not count as reading.
    """

    def __init__(self, store: str, seconds: float = 30.0) -> None:
        self.store, self.seconds = store, seconds
        self._timer: threading.Timer | None = None

    def _set_timer(self, seconds: float, waited: float) -> None:
        self._timer = threading.Timer(seconds, self._tell, (waited + seconds,))
        self._timer.daemon = True
        self._timer.start()

    def _tell(self, waited: float) -> None:
        text = (
            f"no batch for {human_time(waited)}: {self.store} is slow or does not answer; "
            "data.threads=8, a copy on a local disk or storage=int8 help"
        )
        log.warning(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)
        self._set_timer(waited, waited)

    def _begin(self, *args: Any, **kwargs: Any) -> None:
        self._set_timer(self.seconds, 0.0)

    def _end(self, *args: Any, **kwargs: Any) -> None:
        if self._timer is not None:
            self._timer.cancel()

    on_train_start = on_train_batch_end = on_validation_end = _begin
    on_train_batch_start = on_validation_start = on_train_end = on_exception = _end
