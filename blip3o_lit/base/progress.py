"""Progress of a long command: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
"""Seconds between two lines where no terminal is attached."""
UNITS = {"mlp": "steps", "regression": "steps"}
"""What a phase counts, where that is not images."""
Report = Callable[[str, int, int], None]
"""Told of a phase, what of it is done, and its total."""


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


@contextmanager
def phases() -> Iterator[Report]:
    """Show a bar for each phase of a long command; its length and time when it ends."""
    started = 0.0
    with ExitStack() as stack:
        active: Work | None = None

        def report(what: str, done: int, total: int) -> None:
            nonlocal active, started
            if active is None:
                started = time.monotonic()
                active = stack.enter_context(Work(what, total, UNITS.get(what, "images")))
            active.advance(done - active.done)
            if done == total:
                stack.pop_all().close()
                print(f"{what}: {total} {active.unit} in {time.monotonic() - started:.1f} s")
                active = None

        yield report
