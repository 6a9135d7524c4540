"""Progress of a long command: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

UNITS = {"mlp": "steps", "regression": "steps"}
"""What a phase counts, where that is not images."""
Report = Callable[[str, int, int], None]
"""Told of a phase, what of it is done, and its total."""


class Work:
    """Counts units of work, as a context manager: `with Work("reading", 2560, "samples")`.

    Where no terminal is attached, `line_seconds` pass between two lines.
    """

    def __init__(self, label: str, total: int, unit: str, line_seconds: float = 10.0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.line_seconds = line_seconds
        self.done = self._skipped = 0
        self._started = self._shown = time.monotonic()
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(label, total=total, unit=unit, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if not self._bar.disable:  # older versions print an empty line
            self._bar.stop()

    def skip(self, count: int) -> None:
        """Count work that an earlier run did; it does not enter the rate."""
        self._skipped += count
        self.advance(count)

    def advance(self, count: int, note: str = "") -> None:
        """Count finished work; `note` is shown after the numbers."""
        self.done += count
        self._bar.update(self._task, completed=self.done, total=self.total, note=note)
        now = time.monotonic()
        if self._bar.disable and now - self._shown >= self.line_seconds:
            self._shown = now
            rate = (self.done - self._skipped) / (now - self._started)
            left = (self.total - self.done) / rate if rate else 0.0
            counts = f"{self.label}: {self.done:,}/{self.total:,} {self.unit}"
            notes = f", {note}" if note else ""
            print(
                f"{counts}, {rate:,.1f}/s, {left:,.0f} s left{notes}", file=sys.stderr, flush=True
            )


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
