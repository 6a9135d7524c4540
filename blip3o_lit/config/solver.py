"""Solver group: how target tokens are generated from noise."""

from dataclasses import dataclass, replace
from typing import Any, Self

from blip3o_lit.config import registry as register
from blip3o_lit.config.checks import above_zero, check_fields, choice, not_negative
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import FlowConfig

AB2_SHIFT = 0.4
"""Its best grid for few steps, by the worst error over Gaussian targets."""

LATER_START = 0.2
"""Where an ODE starts that has no value at t = 0, unless the run says otherwise."""
MAP_STEPS = (1, 2, 4, 8, 16, 32, 64)
"""Steps of solver=map: the ways that flow.pairs trains are 1, 1/2, ... 1/64 of the whole."""
MOST_FITTED = 40
"""Most evaluations of solver=fitted: as many as the fine trajectories have that it is fitted to."""


@dataclass
class SolverConfig:
    """An estimator: the posterior mean in one evaluation, or an ODE solver that draws a sample."""

    name: str = choice("mean", register.solver)
    """mean (1 evaluation); euler, midpoint, heun, rk4, ab2 with fixed steps; adaptive dopri5; map,
    steps of the map that flow.pairs trains; fitted, what an evaluation fitted to the flow; or one
    of a package's."""
    steps: int = above_zero(10)
    """Steps of a fixed-step solver."""
    nfe: int = above_zero(4)
    """Evaluations of solver=fitted, at most 40."""
    grid: str = choice("uniform", ("uniform", "cosine", "shift"))
    """Spacing of the steps: uniform, cosine (dense at both ends) or shift."""
    shift: float = above_zero(1.0)
    """Shift of grid=shift: above 1 dense near noise, below 1 near data; 1 is uniform."""
    start: float = 0.0
    """Time at which an ODE solver starts; the noise output has no velocity at 0 and needs more."""
    guidance_scale: float = not_negative(1.0)
    """Classifier-free guidance; 1 is none, anything else costs two evaluations per stage."""
    rtol: float = above_zero(1e-3)
    """Relative tolerance of dopri5."""
    atol: float = above_zero(1e-4)
    """Absolute tolerance of dopri5."""

    def __post_init__(self) -> None:
        check_fields(self, "solver.")
        if not 0 <= self.start < 1:
            raise UserError(f"solver.start={self.start} must be between 0 and 1, 1 excluded")
        if self.name == "fitted" and self.nfe > MOST_FITTED:
            raise UserError(f"solver.nfe={self.nfe} is above {MOST_FITTED}: use solver=heun")
        if self.name == "fitted" and self.start > 0:
            raise UserError(f"solver=fitted has its own times: drop solver.start={self.start}")
        own = (self.start, self.grid) == (0, "uniform") and self.steps in MAP_STEPS
        if self.name == "map" and not own:
            raise UserError(
                "solver=map takes 1, 2, 4, ... 64 uniform steps from t = 0: drop solver.start and "
                f"solver.grid, and solver.steps={self.steps} if it is none of these"
            )
        if self.name == "mean" and self.start > 0:
            raise UserError(f"solver=mean evaluates at t = 0: drop solver.start={self.start}")

    @classmethod
    def named(cls, name: str, **options: Any) -> Self:
        """Return a solver as its file in conf/solver has it."""
        own: dict[str, Any] = {"grid": "shift", "shift": AB2_SHIFT} if name == "ab2" else {}
        if name == "map":
            own["steps"] = 1
        return cls(name=name, **(own | options))

    @property
    def label(self) -> str:
        """Name of the estimator in reports, for example `heun-10`, or `heun-10@1.5` guided."""
        guided = "" if self.guidance_scale == 1 else f"@{self.guidance_scale:g}"
        steps = "" if self.name in ("mean", "dopri5") else f"-{self.steps}"
        if self.name == "fitted":
            steps = f"-{self.nfe}"
        return f"{self.name}{steps}{guided}"


def needs_later_start(flow: FlowConfig, solver: SolverConfig) -> bool:
    """Tell whether an ODE solver's first evaluation would have no value at t = 0.

    A noise output has no velocity there (alpha = 0); ab2 needs the estimate of x1.
    """
    if solver.name in ("mean", "map", "fitted"):
        return False
    return flow.prediction == "noise" or (solver.name == "ab2" and not flow.has_mean)


def solver_from_label(label: str) -> SolverConfig:
    """Return the solver that a label stands for: `mean`, `heun-10`, `heun-10@1.5`, `fitted-4`."""
    plain, at, scale = label.partition("@")
    name, dash, steps = plain.partition("-")
    if dash and not (steps.isdigit() and int(steps)):
        raise UserError(f"solver {label!r}: write a name and its steps, for example heun-10")
    try:
        guidance = float(scale) if at else 1.0
    except ValueError:
        raise UserError(f"solver {label!r}: write a guidance scale as in heun-10@1.5") from None
    solver = SolverConfig.named(name, guidance_scale=guidance)
    if not dash:
        return solver
    return replace(solver, **{"nfe" if name == "fitted" else "steps": int(steps)})


def started_later(flow: FlowConfig, solver: SolverConfig, start: float) -> SolverConfig:
    """Return a solver that begins where it has a value: at `start`, unless that is 0."""
    if not needs_later_start(flow, solver):
        return solver
    return replace(solver, start=start or LATER_START)


def check_solver(flow: FlowConfig, solver: SolverConfig) -> None:
    """Raise where this flow has no value at the solver's first time, or knows no guidance."""
    outputs = f"flow.path={flow.path} flow.prediction={flow.prediction}"
    if solver.name == "mean" and not flow.has_mean:
        raise UserError(
            f"solver=mean {outputs}: at t = 0 this output says nothing about x1: use "
            "flow.prediction=sample, or an ODE solver (solver=heun solver.start=0.2)"
        )
    if solver.name == "map" and flow.pairs == 0:
        raise UserError(
            "solver=map needs a network that was trained with flow.pairs above 0: take an ODE "
            "solver (solver=heun), or train one (flow.pairs=0.5, from this run by init_from=RUN)"
        )
    if needs_later_start(flow, solver) and solver.start == 0:
        raise UserError(
            f"solver={solver.name} {outputs}: its first evaluation has no value at t = 0: "
            "set solver.start=0.2"
        )
    if solver.guidance_scale != 1 and flow.condition_dropout == 0:
        raise UserError(
            f"solver.guidance_scale={solver.guidance_scale} needs a network that was trained with "
            "flow.condition_dropout above 0; drop it"
        )
