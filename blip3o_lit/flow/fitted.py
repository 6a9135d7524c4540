"""Solvers fitted to one trained flow: times and weights of least distance to its fine trajectories.

Per budget of evaluations, on some conditions and noises:

1. Fine trajectories are solved once. Along them the state at a later time is regressed on the noise
   and on the estimates at earlier ones, so the times of least squared error, of the sample and,
   weighted, of the states before it, are found in one matrix of inner products, by moving one time
   after the other: nothing is evaluated.
2. With these times the solver runs, and each state is regressed on what the solver itself has
   evaluated so far: closed forms in place of the gradients of Shaul et al. 2024 (arXiv:2403.01329).
3. What comes nearest to the fine samples of the other half of the conditions is chosen, among the
   weights of step 1 and the usual solvers on their grids: so it is never worse than these.

Shapes: x_BND, gram_GG; B conditions (the first half fits, the second chooses), N tokens, D width,
F fine steps, G = 1 + 2 F: the noise, F estimates, the F states after them. K evaluations.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.config.solver import MOST_FITTED, SolverConfig
from blip3o_lit.flow.multistep import multistep
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.scheme import Estimate, Scheme, combined
from blip3o_lit.flow.solvers import solved, time_grid

FINE = MOST_FITTED
"""Evaluations of a fine trajectory, evenly spaced: a trained sample output errs most near t = 1,
and steps that get ever shorter there would multiply its errors."""
STATE_WEIGHTS = (0.03, 0.3, 1.0, 3.0)
"""Weight of the states' squared error beside the sample's, in the choice of times."""
SHIFTS = (0.4, 1.0, 2.0, 3.0)
"""Grids of the usual solvers, and where the search for times begins."""
RIDGE = 1e-7
"""Of each regression, in units of its mean diagonal."""


@dataclass
class Trajectories:
    """Fine trajectories of one half of the conditions: the noise, estimates `F`, states after."""

    estimates: list[Tensor]
    states: list[Tensor]
    noise_BND: Tensor

    def distance(self, x_BND: Tensor) -> float:
        """Return the mean squared distance to the fine samples, over these samples' variance."""
        end_BND = self.states[-1].double()
        spread = (end_BND - end_BND.mean((0, 1))).square().mean()
        return float((x_BND.double() - end_BND).square().mean() / spread)


class SolverFit:
    """Fits solvers of any budget to the same fine trajectories.

    Args:
        objective: The flow.
        first: x1_hat at the conditions of the first half.
        second: The same of the second half.
        noise_BND: Standard normal noise of both.
        start: Time of the first evaluation; above 0 where the flow has no estimate there.
    """

    def __init__(
        self,
        objective: FlowObjective,
        first: Estimate,
        second: Estimate,
        noise_BND: Tensor,
        start: float = 0.0,
    ) -> None:
        begun = time.perf_counter()
        self.objective, self.start = objective, start
        self.estimates = first, second
        sigma = float(objective.path.sigma(torch.tensor(start, dtype=torch.float64)))
        x0 = (sigma * objective.scaled_noise(noise_BND.float())).chunk(2)
        self.grid = time_grid(SolverConfig(name="ab2", steps=FINE, start=start))
        self.fit_on, self.choose_on = (
            self._fine(estimate, x) for estimate, x in zip(self.estimates, x0)
        )
        fine = self.fit_on
        vectors = [fine.noise_BND, *fine.estimates, *fine.states]
        rows_GX = torch.stack([vector.double().flatten() for vector in vectors])
        self.gram_GG = (rows_GX @ rows_GX.T / rows_GX.shape[1]).cpu()
        self.seconds = time.perf_counter() - begun

    def _fine(self, estimate: Estimate, x0_BND: Tensor) -> Trajectories:
        estimates: list[Tensor] = []

        def kept(x_BND: Tensor, t: float) -> Tensor:
            estimates.append(estimate(x_BND, t))
            return estimates[-1]

        states = multistep(kept, self.objective.path, x0_BND, self.grid)
        return Trajectories(estimates, states, x0_BND)

    @torch.no_grad()
    def fit(self, evaluations: int) -> tuple[Scheme, dict[str, Any]]:
        """Return the solver of so many evaluations, and what it was chosen among.

        The record holds `chosen`, `distance`, `fixed` (the distance of each usual solver), all as
        `Trajectories.distance` on the second half, `conditions`, `times` and `seconds`.
        """
        begun = time.perf_counter()
        found = self._usual(evaluations)
        distances = {name: self._distance(scheme) for name, scheme in found.items()}
        usual = {name: distance for name, distance in distances.items() if math.isfinite(distance)}
        record: dict[str, Any] = {"fixed": usual}
        for weight in STATE_WEIGHTS:
            name = f"least squares, states weighing {weight:g}"
            found[name] = self._regressed(self._times(evaluations, weight))
            distances[name] = self._distance(found[name])
        chosen = min(distances, key=lambda name: distances[name])
        record |= {
            "chosen": chosen,
            "distance": distances[chosen],
            "times": found[chosen].times_K.tolist(),
            "conditions": len(self.fit_on.noise_BND) + len(self.choose_on.noise_BND),
            "seconds": time.perf_counter() - begun,
        }
        return found[chosen], record

    def _distance(self, scheme: Scheme) -> float:
        end_BND = scheme.states(self.estimates[1], self.choose_on.noise_BND)[-1]
        distance = self.choose_on.distance(end_BND)
        return distance if math.isfinite(distance) else math.inf

    def _usual(self, evaluations: int) -> dict[str, Scheme]:
        """Return the usual solvers of so many evaluations, by label and shift."""
        found = {}
        for name, cost in (("euler", 1), ("ab2", 1), ("midpoint", 2), ("heun", 2)):
            for steps in sorted({evaluations // cost, (evaluations + 1) // cost} - {0}):
                for shift in SHIFTS if steps > 1 or name == "midpoint" else SHIFTS[:1]:
                    solver = SolverConfig(name=name, steps=steps, grid="shift", shift=shift)
                    scheme = scheme_of(self.objective, replace(solver, start=self.start))
                    if scheme is not None and len(scheme.times_K) == evaluations:
                        found[f"{solver.label}, shift {shift:g}"] = scheme
        return found

    def _times(self, evaluations: int, weight: float) -> list[int]:
        """Return the fine steps at whose beginnings to evaluate, of least squared error."""
        found = []
        for shift in SHIFTS:
            solver = SolverConfig(name="euler", steps=evaluations, grid="shift", shift=shift)
            wanted = time_grid(replace(solver, start=self.start))[:-1]
            chosen = torch.tensor(_nearest(self.grid[:-1], wanted))
            error, before = float(self._errors(chosen[None], weight)), math.inf
            while error < before:
                before = error
                for place in range(1, evaluations):
                    after = int(chosen[place + 1]) if place + 1 < evaluations else FINE
                    steps = torch.arange(int(chosen[place - 1]) + 1, after)
                    trials_TK = chosen.repeat(len(steps), 1)
                    trials_TK[:, place] = steps
                    errors_T = self._errors(trials_TK, weight)
                    error, chosen = float(errors_T.min()), trials_TK[errors_T.argmin()]
            found.append((error, chosen.tolist()))
        return min(found)[1]

    def _errors(self, trials_TK: Tensor, weight: float) -> Tensor:
        """Return the squared error `[T]` of the sample, and `weight` times those of the states.

        The regressions of one trial are nested, so one Cholesky factor serves all of them.
        """
        noise_T1 = torch.zeros_like(trials_TK[:, :1])
        columns_TG = torch.cat([noise_T1, 1 + trials_TK], 1)
        after_TK = torch.cat([trials_TK[:, 1:], noise_T1 + FINE], 1)
        gram_TGG = self.gram_GG[columns_TG[:, :, None], columns_TG[:, None]]
        ridge_T = RIDGE * gram_TGG.diagonal(dim1=1, dim2=2).mean(1)
        identity_GG = torch.eye(columns_TG.shape[1], dtype=gram_TGG.dtype)
        factor_TGG = torch.linalg.cholesky(gram_TGG + ridge_T[:, None, None] * identity_GG)
        cross_TGK = self.gram_GG[columns_TG[:, :, None], FINE + after_TK[:, None]]
        parts_TGK = torch.linalg.solve_triangular(factor_TGG, cross_TGK, upper=False)
        # State n + 1 has the noise and n + 1 estimates to follow from.
        explained_TK = parts_TGK.square().triu(-1).sum(1)
        errors_TK = self.gram_GG.diagonal()[FINE + after_TK] - explained_TK
        return errors_TK[:, -1] + weight * errors_TK[:, :-1].sum(1)

    def _regressed(self, chosen: list[int]) -> Scheme:
        """Return the solver with these times: each state regressed on its own evaluations."""
        fine, estimate = self.fit_on, self.estimates[0]
        weights_KS = torch.zeros(len(chosen), len(chosen) + 1, dtype=torch.float64)
        basis, x_BND = [fine.noise_BND], fine.noise_BND
        for row, (step, after) in enumerate(zip(chosen, [*chosen[1:], FINE])):
            basis.append(estimate(x_BND, self.grid[step]))
            rows_GX = torch.stack([vector.double().flatten() for vector in basis])
            cross_G = (rows_GX @ fine.states[after - 1].double().flatten()).cpu()
            weights_S = _solve((rows_GX @ rows_GX.T).cpu(), cross_G)
            weights_KS[row, : len(basis)] = weights_S
            x_BND = combined(weights_S.tolist(), basis)
        times_K = torch.tensor([self.grid[step] for step in chosen], dtype=torch.float64)
        return Scheme(times_K, weights_KS)


def _solve(gram_GG: Tensor, cross_G: Tensor) -> Tensor:
    ridge_G = torch.full_like(cross_G, RIDGE * float(gram_GG.diagonal().mean()))
    return torch.linalg.solve(gram_GG + torch.diag(ridge_G), cross_G)


def _nearest(grid: list[float], wanted: list[float]) -> list[int]:
    """Return the places nearest to the wanted times, the first 0, each later than the one before.

    Room is left for those that follow.
    """
    places = [0]
    for number, t in enumerate(wanted[1:], start=1):
        place = min(range(len(grid)), key=lambda step: abs(grid[step] - t))
        last = len(grid) - (len(wanted) - number)
        places.append(min(max(place, places[-1] + 1), last))
    return places


class _Recorder:
    """Stands for a trained field: gives unit vectors as estimates, keeps times and states."""

    def __init__(self, objective: FlowObjective) -> None:
        self.objective = objective
        self.times: list[float] = []
        self.states: list[Tensor] = []

    def estimate(self, x_BND: Tensor, t: float) -> Tensor:
        self.times.append(t)
        self.states.append(x_BND)
        unit_BND = torch.zeros_like(x_BND)
        unit_BND[..., len(self.times)] = 1
        return unit_BND

    def velocity(self, x_BND: Tensor, t: float) -> Tensor:
        times_B = torch.tensor([t], dtype=torch.float64)
        unit_BND = self.estimate(x_BND, t)
        return self.objective.path.velocity_from("sample", unit_BND, x_BND, times_B, check=False)


def scheme_of(objective: FlowObjective, solver: SolverConfig) -> Scheme | None:
    """Return a solver with fixed steps as a scheme, None where it needs a velocity at sigma = 0."""
    recorder = _Recorder(objective)
    noise_BND = torch.zeros(1, 1, 4 * solver.steps + 1, dtype=torch.float64)
    noise_BND[..., 0] = 1
    end_BND = solved(recorder, noise_BND, solver)[-1]
    states = torch.cat([*recorder.states[1:], end_BND])[:, 0, : len(recorder.times) + 1]
    if not torch.isfinite(states).all():
        return None
    return Scheme(torch.tensor(recorder.times, dtype=torch.float64), states)
