"""One job of a sweep: a command in a process of its own, and what became of it, in its folder.

`job.json` says what was started and how it ended, `console.log` holds all that it printed. The
process keeps `job.lock` locked while it lives: a sweep that was killed and started again waits for
jobs of the first one that are still at work and takes their results.
"""

import fcntl
import math
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip3o_lit.base.files import read_json, write_json
from blip3o_lit.config.errors import UserError

CONSOLE_FILE = "console.log"
PARENT_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
"""What belongs to the sweep's own process and not to its jobs."""
_ERROR = re.compile(r"(error: |(\w+\.)*\w*(Error|Exception)\b|KeyboardInterrupt)")


@dataclass
class Job:
    number: int
    folder: Path
    overrides: list[str]
    command: list[str]
    state: str = "waiting"
    """Then working, and done, failed, or stopped (by the sweep, to go on later)."""
    error: str | None = None
    earlier: bool = False
    """Whether it was done before this sweep was started."""
    seconds: float = 0.0
    """What it took, without earlier tries."""
    stopping: bool = False
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def try_start(self) -> bool:
        """Start the process; return False while a process of an earlier sweep holds the folder.

        A job that was done before is not started, but counts as ended.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "job.lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            before = read_json(self.folder / "job.json")
            if before and before["overrides"] != self.overrides:
                words = " ".join(before["overrides"])
                raise UserError(
                    f"{self.folder} holds another job ({words}): choose another hydra.sweep.dir"
                )
            if before and (before["state"] == "done" or self.result.get("finished")):
                self.earlier, self.seconds = True, before["seconds"]
                self._enter("done")
                return True
            self._enter("working")
            words = self.command
            if before:
                words = [word for word in words if not word.startswith("overwrite=")]
                words += ["resume=auto"]
            with (self.folder / CONSOLE_FILE).open("ab") as console:
                self.process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    env={k: v for k, v in os.environ.items() if k not in PARENT_VARIABLES},
                    pass_fds=(lock.fileno(),),
                    start_new_session=True,
                )
        self.started = time.monotonic()
        return True

    def ended(self) -> bool:
        """Whether the job has ended; the first time, its end is written down."""
        if self.process is not None and self.state == "working":
            code = self.process.poll()
            if code is None:
                return False
            self.seconds = round(time.monotonic() - self.started, 2)
            if code and not self.stopping:
                self.error = _reason(self.folder / CONSOLE_FILE, code)
            self._enter("failed" if self.error else "stopped" if code else "done")
        return True

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Send a signal on which the job saves and ends."""
        self.stopping = True
        if self.process is not None:
            self.process.send_signal(number)

    @property
    def result(self) -> dict[str, Any]:
        return read_json(self.folder / "result.json")

    @property
    def objective(self) -> float | None:
        """The best held-out cosine, or None where there is no finite one."""
        value = (self.result.get("best") or {}).get("cosine")
        return float(value) if value is not None and math.isfinite(value) else None

    def _enter(self, state: str) -> None:
        self.state = state
        names = ("overrides", "command", "state", "error", "seconds")
        write_json(self.folder / "job.json", {name: getattr(self, name) for name in names})


def _reason(console: Path, code: int) -> str:
    """Return one line that says why a job failed: its last error message, or the signal."""
    if code < 0:
        hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    lines = [line.strip() for line in console.read_text("utf-8", "replace").splitlines()]
    lines = [line for line in lines if line] or [f"exit code {code}"]
    errors = [line for line in lines if _ERROR.match(line)] or lines
    return errors[-1].removeprefix("error: ")[:500]
