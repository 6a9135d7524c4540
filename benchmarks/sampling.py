"""Generating tokens: one evaluation beside many, and cached conditions beside uncached ones."""

from __future__ import annotations

import sys
from typing import Any

import torch

from benchmarks.timing import interleaved, result, save, show
from benchmarks.training import SHAPE, TOKENS, model_config
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.solvers import sample
from blip3o_lit.models.build import build_network

BATCH = 4
MIDPOINT = 50
"""Steps; two evaluations each."""


@torch.inference_mode()
def run() -> list[dict[str, Any]]:
    """Time `tiny` in bf16 for one batch of images."""
    objective = FlowObjective(FlowConfig()).eval()
    aligned = build_network(model_config("tiny"), SHAPE).eval()
    cross = build_network(model_config("tiny", conditioning="cross"), SHAPE).eval()
    condition, noise_BND = torch.randn(BATCH, TOKENS, 4096), torch.randn(BATCH, TOKENS, 1024)
    t_B = torch.full((BATCH,), 0.5)

    def draw(solver: SolverConfig) -> None:
        sample(objective, aligned, condition, noise_BND, solver)

    with torch.autocast("cpu", torch.bfloat16):
        seconds = interleaved(
            {
                "mean": lambda: draw(SolverConfig()),
                "midpoint-50": lambda: draw(SolverConfig("midpoint", MIDPOINT)),
            },
            rounds=3,
        )
        encoded = cross.encode(condition)
        seconds |= interleaved(
            {
                "cross, cached": lambda: cross(noise_BND, t_B, encoded),
                "cross, uncached": lambda: cross(noise_BND, t_B, condition),
            },
            rounds=9,
        )
    for case, value in seconds.items():
        print(f"  {case:<16} {1e3 * value:8.1f} ms a batch of {BATCH}")
    many = seconds["midpoint-50"] / seconds["mean"]
    cached = seconds["cross, cached"] / seconds["cross, uncached"]
    return [
        result("sampling/midpoint_50_over_mean", many, "x", 60),
        result("sampling/cached_over_uncached_cross_step", cached, "x", 0.8, "lower"),
    ]


if __name__ == "__main__":
    found = run()
    show(found)
    save(found)
    sys.exit(0)
