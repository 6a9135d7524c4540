"""A solver as numbers: every explicit one is linear in the noise and in its estimates of x1.

With k evaluations, at times t_0 < ... < t_{k-1} of its own states, each state is

    x_{n+1} = w_n0 x_0 + w_n1 x1_hat(x_0, t_0) + ... + w_n,n+1 x1_hat(x_n, t_n),   n = 0 .. k-1,

and x_k is the sample: a non-stationary solver (Shaul et al. 2024, arXiv:2403.01329). The weights of
a known solver are what it makes of unit vectors.

Shapes: x_BND; B batch, N tokens, D target width, K evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.solver import SolverConfig

Estimate = Callable[[Tensor, float], Tensor]
"""A state and its time to x1_hat."""


@dataclass(frozen=True)
class Scheme:
    """Times `[K]` of the evaluations, and weights `[K, K + 1]` of the states after them, fp64."""

    times_K: Tensor
    weights_KS: Tensor

    def states(self, estimate: Estimate, x0_BND: Tensor) -> list[Tensor]:
        """Return the state after each evaluation, from x0 at the first time."""
        basis, states = [x0_BND], []
        for time, weights_S in zip(self.times_K.tolist(), self.weights_KS.tolist()):
            basis.append(estimate(states[-1] if states else x0_BND, time))
            states.append(combined(weights_S, basis))
        return states


def combined(weights_S: list[float], basis: list[Tensor]) -> Tensor:
    """Return the weighted sum of tensors; weights beyond the last of them are left out."""
    total = weights_S[0] * basis[0]
    for weight, tensor in zip(weights_S[1:], basis[1:]):
        total = torch.add(total, tensor, alpha=weight)
    return total


@dataclass
class FittedSolvers:
    """The schemes that were fitted to one trained flow, by their number of evaluations."""

    schemes: dict[int, Scheme] = field(default_factory=dict)
    records: dict[int, dict[str, Any]] = field(default_factory=dict)
    """What each was chosen among: `flow.fitted.fit`."""
    why_none: str = "none was fitted to these weights"

    def scheme(self, solver: SolverConfig) -> Scheme:
        """Return what `solver=fitted` stands for.

        Raises:
            UserError: If none of so many evaluations was fitted, or guidance is asked for.
        """
        if solver.guidance_scale != 1:
            raise UserError("solver=fitted is fitted without guidance: drop solver.guidance_scale")
        if solver.nfe not in self.schemes:
            raise UserError(
                f"solver=fitted solver.nfe={solver.nfe}: {self.why_none}: run "
                f"python -m blip3o_lit.evaluate ckpt=RUN solvers=[fitted-{solver.nfe}]"
            )
        return self.schemes[solver.nfe]
