"""Ctrl-C in a command: one line that says what is kept and how to go on, and the exit code 130."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTED_CODE = 130
Kept = str | Callable[[], str]
"""What is kept of interrupted work and how to go on, or a function that finds out."""


@contextmanager
def interruptible(kept: Kept) -> Iterator[None]:
    """End the process with one line where Ctrl-C stopped what runs in here."""
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, SystemExit) and error.code == INTERRUPTED_CODE
        if ended or not _by_interrupt(error):
            raise
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends at once, in silence
        if os.environ.get("LOCAL_RANK", "0") == "0":
            words = kept if isinstance(kept, str) else kept()
            print(f"\nstopped: {words}", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED_CODE)


def _by_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: libraries turn it into errors of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
