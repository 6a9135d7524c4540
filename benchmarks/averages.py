"""What two further averages of the weights take of a training step."""

from __future__ import annotations

import copy
from typing import Any

import torch

from benchmarks.timing import interleaved, result
from benchmarks.training import SHAPE, model_config, real_step
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.power_average import decay
from blip3o_lit.training.ema import update_averages

CASES = (("demo", 32), ("base", 8))
"""Model and batch."""
WIDTHS = (0.05, 0.1)


def run() -> list[dict[str, Any]]:
    """Time a step, and beside it what the profiles add to it."""
    return [_case(*case) for case in CASES]


def _case(name: str, batch: int) -> dict[str, Any]:
    network = build_network(model_config(name), SHAPE)
    profiles = [copy.deepcopy(network).requires_grad_(False) for _ in WIDTHS]
    decays = [decay(width, 1000) for width in WIDTHS]
    seconds = interleaved(
        {
            "step": real_step(model_config(name), batch, torch.float32),
            "profiles": lambda: update_averages(profiles, network, decays),
        },
        warm_up=2,
    )
    step, more = 1e3 * seconds["step"], 1e3 * seconds["profiles"]
    print(f"  {name:<5} step {step:.1f} ms, two profiles {more:.2f} ms")
    return result(f"averages/{name}_share_of_step", more / step, "x", 0.02, "lower")
