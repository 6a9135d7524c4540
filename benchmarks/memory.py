"""Peak memory of training `base` beside its sum by arithmetic, and no growth over many steps.

The peak is of the process, above what it held after the imports: weights, gradients, two moments
and the average (20 bytes a parameter), and what the forward pass keeps.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import result
from benchmarks.training import SHAPE, model_config, real_step, saved_bytes
from blip3o_lit.budget.states import rank_bytes, units
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import PRECISIONS

BATCH, STEPS = 8, 3
EARLY, LATE = 20, 120
"""Steps of a small network after which memory is compared."""


def resident(field: str) -> float:
    """Return a field of this process's /proc status, VmRSS or VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * float(next(line.split()[1] for line in lines if line.startswith(field)))


def peak() -> float:
    """Train `base` for a few steps and return the peak in bytes above the imports."""
    before = resident("VmRSS")
    step = real_step(model_config("base"), BATCH, torch.bfloat16)
    for _ in range(STEPS):
        step()
    return resident("VmHWM") - before


def growth() -> float:
    """Return resident memory after many steps over that after few, for a network of two blocks."""
    config = model_config("demo", depth=2, width=128, heads=2, kv_heads=2, mlp_width=256)
    step, seen = real_step(config, 2, torch.bfloat16), {}
    for number in range(1, LATE + 1):
        step()
        seen[number] = resident("VmRSS")
    return seen[LATE] / seen[EARLY]


def run() -> list[dict[str, Any]]:
    """Measure both, each in a process of its own."""
    measured = {}
    for name in ("peak", "growth"):
        command = [sys.executable, "-m", "benchmarks.memory", name]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured[name] = json.loads(done.stdout)
    config = model_config("base")
    held = rank_bytes("single", units(config, SHAPE), PRECISIONS["bf16"], OptimizerConfig(), 1)
    one, two = (saved_bytes(build_network(config, SHAPE), batch) for batch in (1, 2))
    kept = one + (BATCH - 1) * (two - one)  # the weights in bf16 are kept once
    gib = [size / 2**30 for size in (measured["peak"], held, kept)]
    print(f"  base, batch {BATCH}: {gib[0]:.2f} GiB, arithmetic {gib[1]:.2f} + {gib[2]:.2f} GiB")
    over = measured["peak"] / (held + kept)
    return [
        result("memory/base_peak_over_arithmetic", over, "x", 1.25, "lower"),
        result(f"memory/after_{LATE}_steps_over_{EARLY}", measured["growth"], "x", 1.01, "lower"),
    ]


if __name__ == "__main__":
    print(json.dumps({"peak": peak, "growth": growth}[sys.argv[1]]()))
