"""From the command line to its answer: --help, and the first optimizer step of the demo."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import interleaved, result, save, show

ROUNDS = 5


def run() -> list[dict[str, Any]]:
    """Time fresh processes; the demo's tokens are built before, if they are missing."""
    from blip3o_lit.extraction.demo import demo_store

    demo_store()
    train = [sys.executable, "-m", "blip3o_lit.train"]

    def page() -> None:
        subprocess.run([*train, "--help"], check=True, capture_output=True)

    seconds = interleaved({"--help": page}, rounds=ROUNDS)["--help"]
    first = sorted(_first_step(train) for _ in range(3))[1]
    print(f"  --help {seconds:.2f} s, first step of the demo after {first:.2f} s")
    return [
        result("startup/help", seconds, "s", 1.0, "lower"),
        result("startup/first_step", first, "s", 8.0, "lower"),
    ]


def _first_step(train: list[str]) -> float:
    """Return the seconds from the command to its first logged optimizer step."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["experiment=demo", "trainer.max_steps=2", "trainer.log_every=1", "logger=csv"]
        words += ["evaluation.every=1000", "evaluation.images=1", f"hydra.run.dir={Path(folder)}"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*train, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(r"step 1/", line):
                seconds = time.perf_counter() - began
                process.wait()
                return seconds
        raise RuntimeError("no step was logged:\n" + "".join(lines))


if __name__ == "__main__":
    found = run()
    show(found)
    save(found)
    sys.exit(0)
