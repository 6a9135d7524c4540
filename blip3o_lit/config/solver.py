"""Solver group: how target tokens are generated from noise."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import one_of, positive

SOLVERS = ("mean", "euler", "midpoint", "heun", "rk4", "dopri5")
GRIDS = ("uniform", "cosine", "shift")


@dataclass
class SolverConfig:
    """An estimator: the posterior mean in one evaluation, or an ODE solver that draws a sample."""

    name: str = "mean"
    """mean (1 evaluation), euler, midpoint, heun, rk4 with fixed steps, or adaptive dopri5."""
    steps: int = 10
    """Steps of a fixed-step solver."""
    grid: str = "uniform"
    """Spacing of the steps: uniform, cosine (dense at both ends) or shift (dense near noise)."""
    shift: float = 1.0
    """Shift of grid=shift; 1 is uniform."""
    rtol: float = 1e-3
    """Relative tolerance of dopri5."""
    atol: float = 1e-4
    """Absolute tolerance of dopri5."""

    def __post_init__(self) -> None:
        """Check each value."""
        one_of("solver.name", self.name, SOLVERS)
        one_of("solver.grid", self.grid, GRIDS)
        for key in ("steps", "shift", "rtol", "atol"):
            positive(f"solver.{key}", getattr(self, key))

    @property
    def label(self) -> str:
        """Name of the estimator in reports, for example `heun-10`."""
        return self.name if self.name in ("mean", "dopri5") else f"{self.name}-{self.steps}"
