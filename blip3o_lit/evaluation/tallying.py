"""Which estimators a translator is scored by, each with its tally.

Shape suffixes: N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import OWN, EvaluateConfig
from blip3o_lit.config.solver import SolverConfig, solver_from_label
from blip3o_lit.evaluation.estimators import Estimator, generated
from blip3o_lit.evaluation.main_pass import Tallies
from blip3o_lit.evaluation.probes import Draws
from blip3o_lit.evaluation.tally import Reference, Tally
from blip3o_lit.flow.memo import Memo

AVERAGE_SCORES = ("cosine", "cosine_ci95", "cosine_centred", "mse", "norm_ratio", "frechet")


@dataclass(frozen=True)
class Tallying:
    """Makes tallies of target tokens of a shape, beside their mean `[N, D]`."""

    config: EvaluateConfig
    shape: TokenShape
    device: torch.device
    mean_ND: Tensor

    def of(
        self, estimators: dict[str, Estimator], breadth: bool = True, memo: Memo | None = None
    ) -> Tallies:
        """Return a tally for each estimator; `memo` is what they share."""
        metrics = self.config.metrics
        return {
            name: Tally(estimate, self.mean_ND, self.shape, self.device, breadth, metrics, memo)
            for name, estimate in estimators.items()
        }

    def estimators(self, loaded: Loaded) -> Tallies:
        """Return a tally for the posterior mean, where there is one, and for each solver."""
        solvers = [solver_from_label(label) for label in self.config.estimators]
        own, means = loaded.config.solver, [SolverConfig()] * loaded.config.flow.has_mean
        if loaded.shape.words is not None and own.name != "mean":
            # Captions leave much open: the run's own samples speak for it, not the mean.
            solvers = [own, *means, *solvers]
        else:
            solvers = [*means, *solvers]
        if not solvers:
            raise UserError("this flow has no posterior mean at t = 0: name a solver in solvers=[]")
        found = {s.label: generated(loaded, s, self.config.seed) for s in solvers}
        return self.of(found, memo=loaded.translator.memo)

    def averaged(self, averages: dict[float, Loaded], headline: str) -> Tallies:
        """Return a tally for each average of a run's weights, by the headline's estimator."""
        solver, seed = solver_from_label(headline), self.config.seed
        found = {f"{width:g}": generated(one, solver, seed) for width, one in averages.items()}
        return self.of(found, breadth=False)

    def curve(self, loaded: Loaded) -> Tallies:
        """Return a tally for each point of the curve over evaluations."""
        solvers = [solver_from_label(label) for label in self.config.curve]
        found = {s.label: generated(loaded, s, self.config.seed) for s in solvers}
        return self.of(found, False, loaded.translator.memo)

    def draws(self, loaded: Loaded, watch: Callable[[Tensor], None]) -> Draws | None:
        """Return what counts several samples per condition; None where there are none."""
        count, config = self.config.samples, self.config
        if count < 2 or not config.solvers or not loaded.config.flow.has_mean:
            return None
        solver = solver_from_label(config.solvers[0])
        draws = [generated(loaded, solver, config.seed + number) for number in range(count)]
        return Draws(draws, generated(loaded, SolverConfig(), config.seed), self.device, watch)


def scores_of_averages(
    own: dict[str, Any], averages: dict[float, Loaded], tallies: Tallies, reference: Reference
) -> dict[str, Any]:
    """Return the scores of each average beside the run's `own`, and which is best."""
    results = {OWN: own} | {name: tally.result(reference) for name, tally in tallies.items()}
    scores = {
        name: {key: found[key] for key in AVERAGE_SCORES if key in found}
        for name, found in results.items()
    }
    for width, one in averages.items():
        scores[f"{width:g}"] |= one.facts["average"]
    best = max(scores, key=lambda name: scores[name]["cosine"])
    return {"scores": scores, "best": best}
