"""From the command line to its answer: --help, and the first optimizer step of the demo.

Python keeps the bytecode of what it imports, as it does unless PYTHONDONTWRITEBYTECODE is set.
`make setup` and pip compile that of the packages; an environment without it starts much slower.
BENCH_COMPILED=1 times two compiled starts as well (minutes): the second finds the first one's
kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import interleaved, result

ROUNDS = 5
TRAIN = [sys.executable, "-m", "blip3o_lit.train"]


def run() -> list[dict[str, Any]]:
    """Time fresh processes; the demo's tokens are built before, if they are missing."""
    from blip3o_lit.extraction.demo import demo_store

    demo_store()
    with tempfile.TemporaryDirectory() as folder:
        kept = {**os.environ, "PYTHONPYCACHEPREFIX": folder}
        kept["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
        kept.pop("PYTHONDONTWRITEBYTECODE", None)

        def page() -> None:
            command = [*TRAIN, "--help"]
            subprocess.run(command, check=True, capture_output=True, env=kept)

        seconds = interleaved({"--help": page}, rounds=ROUNDS)["--help"]
        _first_step(kept)
        first = sorted(_first_step(kept) for _ in range(3))[1]
        print(f"  --help {seconds:.2f} s, first step of the demo after {first:.2f} s")
        found = [
            result("startup/help", seconds, "s", 1.0, "lower"),
            result("startup/first_step", first, "s", 8.0, "lower"),
        ]
        if os.environ.get("BENCH_COMPILED") == "1":
            cold, warm = (_first_step(kept, "model.compile=true") for _ in range(2))
            print(f"  compiled: {cold:.1f} s, again {warm:.1f} s")
            found.append(result("startup/compiled_again", warm / cold, "x", 1 / 3, "lower"))
    return found


def _first_step(environment: dict[str, str], *further: str) -> float:
    """Return the seconds from the command to its first logged optimizer step."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["experiment=demo", "trainer.max_steps=2", "trainer.log_every=1", "logger=csv"]
        words += ["evaluation.every=1000", "evaluation.images=1", f"hydra.run.dir={Path(folder)}"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*TRAIN, *words, *further], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if re.match(r"step 1/", line):
                seconds = time.perf_counter() - began
                process.wait()
                return seconds
        raise RuntimeError("no step was logged:\n" + "".join(lines))
