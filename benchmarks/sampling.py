"""Generating tokens: one evaluation beside many, and cached conditions beside uncached ones.

Scoring a batch (standardising, generating, cosine) is timed for both solvers too; what 1,000 images
take follows from it, since every batch costs the same.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from benchmarks.timing import interleaved, result
from benchmarks.training import SHAPE, TOKENS, model_config
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.solver import SolverConfig, solver_from_label
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.solvers import sample
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.models.network import Network
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import cast_weights
from blip3o_lit.tokens.statistics import Standardizer
from blip3o_lit.translation.translator import Translator

BATCH = 4
SOLVERS = ("euler-4", "ab2-4", "ab2-8", "heun-10", "rk4-10")
MIDPOINT = 50
"""Steps; two evaluations each."""


@torch.inference_mode()
def run() -> list[dict[str, Any]]:
    """Time `tiny` in bf16 for one batch of images."""
    objective = FlowObjective(FlowConfig()).eval()
    aligned = build_network(model_config("tiny"), SHAPE).eval()
    cross = build_network(model_config("tiny", conditioning="cross"), SHAPE).eval()
    plain = copy.deepcopy(aligned)
    for network in (aligned, cross):
        cast_weights(network, torch.bfloat16)  # as a loaded translator has them
    condition, noise_BND = torch.randn(BATCH, TOKENS, 4096), torch.randn(BATCH, TOKENS, 1024)
    t_B = torch.full((BATCH,), 0.5)

    def draw(solver: SolverConfig, network: Network = aligned) -> None:
        sample(objective, network, condition, noise_BND, solver)

    scales = [Standardizer.identity(side) for side in (SHAPE.condition, SHAPE.target)]
    translator = Translator(aligned, objective, *scales)
    scores = TokenScores(scales[1].mean_NC, SHAPE.target)
    ids, true_BND = torch.arange(BATCH), torch.randn_like(noise_BND)

    def score(solver: SolverConfig) -> None:
        made = translator.generate(condition, ids, 0, solver)
        scores.update(made.x1_BND, true_BND, torch.ones(BATCH, dtype=torch.bool))

    with torch.autocast("cpu", torch.bfloat16):
        seconds = interleaved(
            {
                "mean": lambda: draw(SolverConfig()),
                "midpoint-50": lambda: draw(SolverConfig("midpoint", MIDPOINT)),
            },
            rounds=3,
        )
        seconds |= interleaved(
            {label: partial(draw, solver_from_label(label)) for label in SOLVERS}
            | {"heun-10, autocast": lambda: draw(solver_from_label("heun-10"), plain)},
            rounds=5,
        )
        seconds |= interleaved(
            {
                "scored, mean": lambda: score(SolverConfig()),
                "scored, midpoint-50": lambda: score(SolverConfig("midpoint", MIDPOINT)),
            },
            rounds=2,
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
        print(f"  {case:<17} {1e3 * value:8.1f} ms a batch of {BATCH}")
    for case in ("scored, mean", "scored, midpoint-50"):
        print(f"  1,000 images {case}: {1000 / BATCH * seconds[case]:.0f} s, from one batch")
    many = seconds["midpoint-50"] / seconds["mean"]
    cached = seconds["cross, cached"] / seconds["cross, uncached"]
    once = seconds["heun-10, autocast"] / seconds["heun-10"]
    evaluation = seconds["scored, midpoint-50"] / seconds["scored, mean"]
    return [
        result("sampling/midpoint_50_over_mean", many, "x", 60),
        result("sampling/evaluation_midpoint_50_over_mean", evaluation, "x", 60),
        result("sampling/weights_cast_once_over_autocast", once, "x", 1.0),
        result("sampling/cached_over_uncached_cross_step", cached, "x", 0.8, "lower"),
    ]
