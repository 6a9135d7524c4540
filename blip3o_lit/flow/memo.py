"""What solvers at one condition have in common is computed once, and its time is told to each."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Memo:
    """Results at one condition by key, with the seconds that each took.

    `saved` are the seconds of all results that were found instead of computed, so that the time of
    a solver alone is what passed while it ran and what `saved` grew by.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.saved = 0.0
        self._source: Any = None
        self._found: dict[Hashable, tuple[Any, float]] = {}

    def at(self, condition: Any) -> None:
        """Forget all that is of another condition."""
        if condition is not self._source:
            self._source = condition
            self._found.clear()

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what was computed under a key at this condition, or compute it."""
        if key in self._found:
            value, seconds = self._found[key]
            self.saved += seconds
            return value
        start, saved = self.now(), self.saved
        value = compute()
        self._found[key] = value, self.now() - start + self.saved - saved
        return value

    def now(self) -> float:
        """Return seconds on a clock, when the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
