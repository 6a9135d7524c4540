"""What is scored: a translator by one solver, a fitted baseline, or a known law's optimum.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.solver import SolverConfig, check_solver, needs_later_start
from blip3o_lit.evaluation.baselines import Baseline
from blip3o_lit.testbeds.law import PROBLEM, Problem
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.translation.translator import Translator

Estimator = Callable[[Tensor, Tensor], tuple[Tensor, int]]
"""(raw condition [B, M, C], sample ids [B]) -> (raw target tokens [B, N, D], evaluations)."""
LATER_START = 0.2
"""Where an ODE starts that has no value at t = 0, unless the run says otherwise."""


def generated(loaded: Loaded, solver: SolverConfig, seed: int) -> Estimator:
    """Return a translator as an estimator; another `seed` has other noise."""
    run = loaded.config
    if needs_later_start(run.flow, solver):
        solver = replace(solver, start=run.solver.start or LATER_START)
    check_solver(run.flow, solver)

    def generate(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        made = loaded.translator.generate(condition_BMC, sample_B, seed, solver)
        return made.x1_BND, made.nfe

    return generate


def fitted(baseline: Baseline, translator: Translator) -> Estimator:
    """Return a baseline, which works on standardised tokens, as an estimator."""
    condition_scale = translator.condition_standardizer
    target_scale = translator.target_standardizer

    def predict(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        made_BND = baseline.predict(condition_scale.standardise(condition_BMC))
        return target_scale.restore(made_BND), 0

    return predict


def known_problem(reader: TokenReader) -> Problem | None:
    """Return the law of the tokens where the store was drawn from a known one."""
    plain = reader.mode.name == "patch_only" and reader.condition == "eva"
    path = Path(reader.store.path)
    return Problem.load(path) if plain and (path / PROBLEM).is_file() else None


def exact_estimators(problem: Problem | None) -> dict[str, Estimator]:
    """Return the exact posterior mean and an exact posterior sample as estimators, in this order.

    Their squared errors are tr Cov[x1|c] / D and twice that, in expectation.
    """
    if problem is None:
        return {}
    random = torch.Generator().manual_seed(0)

    def mean(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        return problem.posterior_mean(condition_BMC.cpu()).to(condition_BMC.device), 0

    def sample(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        return problem.posterior_sample(condition_BMC.cpu(), random).to(condition_BMC.device), 0

    return {"mean": mean, "sample": sample}
