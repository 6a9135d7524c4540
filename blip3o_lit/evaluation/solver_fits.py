"""The fitted solvers that an evaluation asks for, fitted on the training split where missing.

Shape suffixes: B images.
"""

import numpy as np
import torch

from blip3o_lit.base.progress import Report
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.solver import LATER_START, SolverConfig, needs_later_start, solver_from_label
from blip3o_lit.flow import draws
from blip3o_lit.flow.draws import Stream
from blip3o_lit.flow.fitted import SolverFit
from blip3o_lit.flow.scheme import FittedSolvers
from blip3o_lit.flow.solvers import Evaluations
from blip3o_lit.tokens.reading.order import evenly
from blip3o_lit.tokens.reading.reader import TokenReader

TOKENS = 2048
"""Tokens that solvers are fitted on, about."""
FEWEST, MOST = 16, 128
"""Images that solvers are fitted on."""


def missing_budgets(loaded: Loaded, labels: list[str]) -> list[int]:
    """Return the evaluations of the fitted solvers among labels that are still to be fitted."""
    solvers = (solver_from_label(label) for label in labels)
    asked = {solver.nfe for solver in solvers if solver.name == "fitted"}
    return sorted(asked - loaded.translator.fitted.schemes.keys())


def fit_solvers(
    loaded: Loaded, train: TokenReader | None, budgets: list[int], seed: int, report: Report
) -> None:
    """Fit solvers of these evaluations to a translator, which has them from then on."""
    if not budgets:
        return
    if train is None:
        raise UserError(
            f"solvers=[fitted-{budgets[0]}]: none is stored for these weights, and there is no "
            "training split to fit one on: leave it out"
        )
    run, translator = loaded.config, loaded.translator
    later = needs_later_start(run.flow, SolverConfig.named("ab2"))
    start = run.solver.start or LATER_START if later else 0.0
    tokens = loaded.shape.target.tokens
    images = min(len(train), max(FEWEST, min(MOST, TOKENS // tokens))) // 2 * 2
    if images < 2:
        raise UserError(f"solvers=[fitted-{budgets[0]}] is fitted on 2 training images or more")
    device = next(translator.network.parameters()).device
    ids = evenly(len(train), images)
    # Both halves are spread over the whole split.
    ids = np.concatenate([ids[::2], ids[1::2]])
    condition = translator.standardised(train.read(ids)["condition"].to(device))
    shape = tuple(translator.target_standardizer.mean_NC.shape)
    sample_B = torch.from_numpy(ids)
    epoch_B = torch.zeros_like(sample_B)
    noise_BND = draws.noise(seed, Stream.FITTING_NOISE, sample_B, epoch_B, shape, device)
    report("fitted solvers", 0, len(budgets))
    with torch.no_grad(), translator.precision(device.type):
        objective, network = translator.objective, translator.network
        parts = condition[: images // 2], condition[images // 2 :]
        halves = (Evaluations(objective, network, part, 1.0) for part in parts)
        first, second = (half.estimate for half in halves)
        fit = SolverFit(objective, first, second, noise_BND, start)
        schemes, records = dict(translator.fitted.schemes), dict(translator.fitted.records)
        for number, nfe in enumerate(budgets):
            schemes[nfe], records[nfe] = fit.fit(nfe)
            records[nfe]["seconds"] += fit.seconds / len(budgets)
            report("fitted solvers", number + 1, len(budgets))
    translator.fitted = FittedSolvers(schemes, records)
