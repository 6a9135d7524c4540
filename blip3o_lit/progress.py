"""Progress of a long command: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Seconds between two lines where no terminal is attached."""


class Work:
    """Counts units of work; use as a context manager.

    Example:
        with Work("converting", 2560, "samples") as work:
            work.advance(64)
    """

    def __init__(self, label: str, total: int, unit: str) -> None:
        """Name the work; nothing is shown before the context is entered."""
        self.label, self.total, self.unit = label, total, unit
        self.done = 0
        self._started = self._shown = time.monotonic()
        self._counted = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Work:
        """Start the bar on a terminal."""
        console = Console(stderr=True)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.add_task(self.label, total=self.total, unit=self.unit, note="")
            self._bar.start()
        return self

    def skip(self, count: int) -> None:
        """Count work that an earlier run did; it does not enter the rate."""
        self._counted -= count
        self.advance(count)

    def advance(self, count: int, note: str = "") -> None:
        """Count finished work; `note` is shown after the numbers."""
        self.done += count
        self._counted += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0], completed=self.done, total=self.total, note=note
            )
        elif now - self._shown >= PLAIN_SECONDS:
            self._shown = now
            rate = self._counted / (now - self._started)
            left = (self.total - self.done) / rate if rate else 0.0
            print(
                f"{self.label}: {self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, "
                f"{left:,.0f} s left" + (f", {note}" if note else ""),
                file=sys.stderr,
                flush=True,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
