"""From noise to tokens: the posterior mean in one evaluation, or an ODE solver that draws a sample.

Integration runs from t = 0 (noise) to t = 1 (data) and starts at sigma(0) z, which is not unit on
every path. Shapes: x_BND, grid_S; B batch, N tokens, D target width, S grid points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torchdiffeq import odeint

from blip3o_lit.base.condition import dropped
from blip3o_lit.config import registry as register
from blip3o_lit.config.solver import SolverConfig, check_solver
from blip3o_lit.flow.memo import Memo
from blip3o_lit.flow.multistep import multistep
from blip3o_lit.flow.objective import FlowObjective, Network
from blip3o_lit.flow.path import Path
from blip3o_lit.flow.scheme import Scheme
from blip3o_lit.flow.times import shifted

Field = Callable[[Tensor, float], Tensor]
Step = Callable[[Field, Tensor, float, float], Tensor]
T = TypeVar("T")

# dopri5 stops this far before a t = 1 that has no velocity; the last stretch returns x1_hat.
LAST_STRETCH = 0.01


@dataclass(frozen=True)
class Sample:
    """What a solver returns."""

    x1_BND: Tensor
    """Generated tokens x1, standardised as the network knows them; raw from Translator.generate."""
    nfe: int
    """Network evaluations per sample, counted."""
    intermediates: list[Tensor]
    """The state after each step in the same space, the last equal to `x1_BND`; empty unless asked
    for."""


def time_grid(config: SolverConfig) -> list[float]:
    """Return the steps + 1 times of a fixed-step solver, from config.start to 1.

    uniform: u; cosine: (1 - cos pi u)/2; shift: the noise-level shift of times.py.
    """
    return list(_grid(config.grid, config.steps, config.shift, config.start))


@lru_cache
def _grid(name: str, steps: int, shift: float, start: float) -> tuple[float, ...]:
    """Return a grid; kept, so that a graph is traced around its numbers."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    if name == "cosine":
        u = (1 - torch.cos(math.pi * u)) / 2
    elif name == "shift":
        u = shifted(u, shift)
    return tuple((start + (1 - start) * u).tolist())


def _euler(field: Field, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * field(x, t)


def _midpoint(field: Field, x: Tensor, t: float, h: float) -> Tensor:
    return x + h * field(x + h / 2 * field(x, t), t + h / 2)


def _heun(field: Field, x: Tensor, t: float, h: float) -> Tensor:
    first = field(x, t)
    return x + h / 2 * (first + field(x + h * first, t + h))


def _rk4(field: Field, x: Tensor, t: float, h: float) -> Tensor:
    k1 = field(x, t)
    k2 = field(x + h / 2 * k1, t + h / 2)
    k3 = field(x + h / 2 * k2, t + h / 2)
    k4 = field(x + h * k3, t + h)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


STEPS: dict[str, Step] = {"euler": _euler, "midpoint": _midpoint, "heun": _heun, "rk4": _rk4}


def integrate(
    field: Field,
    x0_BND: Tensor,
    grid_S: list[float],
    method: str,
    rtol: float = 1e-3,
    atol: float = 1e-4,
) -> list[Tensor]:
    """Return the state at each time after the first, where dx/dt = field(x, t) and x0 at the first.

    Times increase or decrease. euler, midpoint, heun and rk4 take one step per interval, of orders
    1, 2, 2 and 4; dopri5 adapts its steps to the error of the whole batch, by `rtol` and `atol`.
    """
    if method == "dopri5":
        times = torch.tensor(grid_S, dtype=torch.float64, device=x0_BND.device)
        states = odeint(
            lambda t, x: field(x, float(t)), x0_BND, times, rtol=rtol, atol=atol, method="dopri5"
        )
        return list(torch.unbind(cast(Tensor, states))[1:])
    states, x_BND = [], x0_BND
    own = register.solver.own(method)
    step = STEPS[method] if own is None else own.build
    for start, end in zip(grid_S, grid_S[1:]):
        x_BND = step(field, x_BND, start, end - start)
        states.append(x_BND)
    return states


@torch.no_grad()
def sample(
    objective: FlowObjective,
    network: Network,
    condition: Any,
    noise_BND: Tensor,
    solver: SolverConfig,
    intermediates: bool = False,
    scheme: Scheme | None = None,
    memo: Memo | None = None,
    draw: Hashable = None,
) -> Sample:
    """Generate tokens from noise.

    `mean` evaluates once at t = 0 and returns the posterior mean E[x1|c]; every other solver
    returns a draw from p(x1|c), `map` by steps of the map that flow.pairs trains. A network with an
    `encode` method encodes its condition once.

    A sample output has no velocity at sigma = 0, and a useless one where sigma is below the change
    of one step (the network's error is divided by sigma). A stage that falls on such a t = 1 is
    replaced: the last step returns x1_hat itself, one evaluation instead of the method's.

    Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598) extrapolates from the output
    without condition to the one with it. All conversions are affine, so this guides the velocity
    and the estimate alike.

    Args:
        objective: Reads the network's output.
        network: The network, (x_BND, t_B, condition) -> out_BND.
        condition: Its condition, as the network takes it.
        noise_BND: Standard normal noise; sets shape, device and the sample drawn.
        solver: Which estimator.
        intermediates: Keep the state after each step.
        scheme: What `fitted` stands for.
        memo: Shares the encoded condition and the first output with other solvers.
        draw: What tells this noise from others in it.

    Raises:
        UserError: If the flow has no value at the solver's first time.
    """
    check_solver(objective.config, solver)
    model = Evaluations(objective, network, condition, solver.guidance_scale, memo, draw)
    start = solver.start if scheme is None else float(scheme.times_K[0])
    first, _ = noise_at(objective.path, start)
    x_BND = first * objective.scaled_noise(noise_BND.float())
    if solver.name == "mean":
        states = [model.estimate(x_BND, 0.0)]
    elif solver.name == "map":
        grid_S, states = time_grid(solver), []
        for t, s in zip(grid_S, grid_S[1:]):
            x_BND = model.mapped(x_BND, t, s)
            states.append(x_BND)
    elif scheme is not None:
        states = scheme.states(model.estimate, x_BND)
    else:
        states = solved(model, x_BND, solver, intermediates)
    tokens = [objective.to_tokens(state) for state in (states if intermediates else states[-1:])]
    return Sample(tokens[-1], model.evaluations, tokens if intermediates else [])


class Model(Protocol):
    """What is solved: an estimate of x1 and a velocity at a state and its time."""

    objective: FlowObjective

    def velocity(self, x_BND: Tensor, t: float) -> Tensor: ...

    def estimate(self, x_BND: Tensor, t: float) -> Tensor: ...


class Evaluations:
    """The trained field at one condition, guided where asked for; counts network evaluations."""

    def __init__(
        self,
        objective: FlowObjective,
        network: Network,
        condition: Any,
        guidance: float,
        memo: Memo | None = None,
        draw: Hashable = None,
    ) -> None:
        self.objective, self.network, self.guidance = objective, network, guidance
        self.memo, self.draw = memo, draw
        encode = getattr(network, "encode", lambda condition: condition)
        self.condition = self._once("condition", lambda: encode(condition))
        self.null = None
        if guidance != 1:
            self.null = self._once("null", lambda: encode(dropped(condition)))
        self.evaluations, self.time = 0, 0.0

    def velocity(self, x_BND: Tensor, t: float) -> Tensor:
        t_B = self._times(x_BND, t)
        return self.objective.velocity(self._first, self.condition, x_BND, t_B, False)

    def estimate(self, x_BND: Tensor, t: float) -> Tensor:
        t_B = self._times(x_BND, t)
        return self.objective.estimate(self._first, self.condition, x_BND, t_B, False)

    def mapped(self, x_BND: Tensor, t: float, s: float) -> Tensor:
        """Return the state at s, by one step of the trained map."""
        t_B, s_B = _times(x_BND, t), _times(x_BND, s)
        out_BND = self.objective.predict(self._guided, self.condition, x_BND, t_B, s_B=s_B)
        return self.objective.path.step(x_BND, out_BND, t_B, s_B)

    def _first(self, x_BND: Tensor, t_B: Tensor, condition: Any) -> Tensor:
        """Return the guided output; at the first state it is shared, as that is of the noise alone.

        Outputs that see none of that are shared between draws, too.
        """
        if self.evaluations:
            return self._guided(x_BND, t_B, condition)
        draw = None if self.time == 0 and self.objective.blind_at_zero else self.draw
        key = (self.time, self.guidance, draw)
        out_BND = self._once(key, lambda: self._guided(x_BND, t_B, condition))
        self.evaluations = 1 if self.null is None else 2
        return out_BND

    def _once(self, key: Hashable, compute: Callable[[], T]) -> T:
        return compute() if self.memo is None else self.memo.once(key, compute)

    def _times(self, x_BND: Tensor, t: float) -> Tensor:
        self.time = t
        return _times(x_BND, t)

    def _guided(self, x_BND: Tensor, t_B: Tensor, condition: Any, *ends: Tensor) -> Tensor:
        out_BND = self._counted(x_BND, t_B, condition, *ends)
        if self.null is None:
            return out_BND
        return torch.lerp(self._counted(x_BND, t_B, self.null, *ends), out_BND, self.guidance)

    def _counted(self, x_BND: Tensor, t_B: Tensor, condition: Any, *ends: Tensor) -> Tensor:
        self.evaluations += 1
        return self.network(x_BND, t_B, condition, *ends).float()


def _times(x_BND: Tensor, t: float) -> Tensor:
    return torch.full((x_BND.shape[0],), t, dtype=torch.float32, device=x_BND.device)


def solved(
    model: Model, x_BND: Tensor, solver: SolverConfig, intermediates: bool = False
) -> list[Tensor]:
    """Return the state after each step of an ODE solver from its start, mindful of a singular end.

    Of dopri5 without `intermediates`, the last alone.
    """
    grid_S = time_grid(solver)
    if solver.name == "ab2":
        return multistep(model.estimate, model.objective.path, x_BND, grid_S)
    singular = _singular_end(model.objective, solver, grid_S)
    if singular and solver.name == "dopri5":
        grid_S = [t for t in grid_S if t < 1 - LAST_STRETCH] + [1 - LAST_STRETCH, 1.0]
    if solver.name == "dopri5" and not intermediates:
        grid_S = [grid_S[0], *grid_S[-2 if singular else -1 :]]
    covered = grid_S[:-1] if singular else grid_S
    states = integrate(model.velocity, x_BND, covered, solver.name, solver.rtol, solver.atol)
    if singular:
        states.append(model.estimate(states[-1] if states else x_BND, covered[-1]))
    return states


def _singular_end(objective: FlowObjective, solver: SolverConfig, grid_S: list[float]) -> bool:
    """Whether a stage would fall on a t = 1 where the sample output gives no velocity."""
    if objective.config.prediction != "sample" or solver.name in ("euler", "midpoint"):
        return False
    last_step = LAST_STRETCH if solver.name == "dopri5" else grid_S[-1] - grid_S[-2]
    sigma, d_sigma = noise_at(objective.path, 1.0)
    return sigma < last_step * abs(d_sigma)


@lru_cache
def noise_at(path: Path, t: float) -> tuple[float, float]:
    """Return sigma and its derivative at one time; kept, so that a graph is traced around them."""
    time = torch.tensor(t, dtype=torch.float64)
    return path.sigma(time).item(), path.d_sigma(time).item()
