"""What is scored: a translator by one solver, or a known law's optimum; baselines.py has others.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.solver import SolverConfig, check_solver, started_later
from blip3o_lit.testbeds.law import PROBLEM, Problem
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.reader import TokenReader

Batch = tuple[Tensor, Tensor, Tensor]
"""Raw condition [B, M, C] and raw target [B, N, D] on the device, sample ids [B] on the CPU."""
Estimator = Callable[[Tensor, Tensor], tuple[Tensor, int]]
"""(raw condition [B, M, C], sample ids [B]) -> (raw target tokens [B, N, D], evaluations)."""


def generated(loaded: Loaded, solver: SolverConfig, seed: int) -> Estimator:
    run = loaded.config
    solver = started_later(run.flow, solver, run.solver.start)
    check_solver(run.flow, solver)

    def generate(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        sample = loaded.translator.generate(condition_BMC, sample_B, seed, solver)
        return sample.x1_BND, sample.nfe

    return generate


def known_problem(reader: TokenReader) -> Problem | None:
    """Return the law of the tokens where the store was drawn from a known one."""
    plain = reader.mode.name == "patch_only" and reader.grid == "eva" and not reader.words
    plain &= not isinstance(reader, MixedReader)  # each of its stores has a law of its own
    path = Path(reader.store.path)
    return Problem.load(path) if plain and (path / PROBLEM).is_file() else None


def exact_estimators(problem: Problem) -> dict[str, Estimator]:
    """Return the exact posterior mean and an exact posterior sample.

    Their squared errors are tr Cov[x1|c] / D and twice that, in expectation.
    """
    random = torch.Generator().manual_seed(0)

    def mean(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        return problem.posterior_mean(condition_BMC.cpu()).to(condition_BMC.device), 0

    def sample(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        return problem.posterior_sample(condition_BMC.cpu(), random).to(condition_BMC.device), 0

    return {"mean": mean, "sample": sample}
