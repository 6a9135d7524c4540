"""The two-step Adams-Bashforth method on the estimate of x1, exact in the noise.

On every Gaussian path x_t / sigma(t) moves by the estimate alone, d(x / sigma) = x1_hat d(alpha /
sigma). So with x1_hat constant over a step, the step is exact (Euler on a straight path, DDIM in
general); here x1_hat is continued linearly from the last two times, for one evaluation per step
and order 2. DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095) continues it in log(alpha / sigma),
which has no value at t = 0. The last time is never evaluated.

Shapes: x_BND, grid_S; B batch, N tokens, D target width, S grid points.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.flow.path import Path

NODES = 64  # of the Gauss-Legendre rule for the integral of alpha / sigma


def multistep(
    estimate: Callable[[Tensor, float], Tensor], path: Path, x0_BND: Tensor, grid_S: list[float]
) -> list[Tensor]:
    """Return the state at each time after the first, from x0 at the first.

    `estimate` maps a state and its time to x1_hat; sigma may be zero at the last time alone.
    """
    states, x_BND = [], x0_BND
    before: tuple[Tensor, float] | None = None
    for start, end in zip(grid_S, grid_S[1:]):
        now_BND = estimate(x_BND, start)
        shrink, constant, linear = coefficients(path, start, end)
        x_BND = shrink * x_BND + constant * now_BND
        if before is not None:
            x_BND = x_BND + linear / (start - before[1]) * (now_BND - before[0])
        before = now_BND, start
        states.append(x_BND)
    return states


@lru_cache
def coefficients(path: Path, start: float, end: float) -> tuple[float, float, float]:
    """Return what a step multiplies the state, the estimate and the estimate's slope by.

    With r = alpha / sigma they are sigma_b / sigma_a, sigma_b (r_b - r_a) and, by parts,
    sigma_b integral of (t - a) dr = (b - a) alpha_b - sigma_b integral of r dt.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    inner = start + (end - start) * (nodes + 1) / 2
    t_S = torch.tensor([start, end, *inner], dtype=torch.float64)
    alpha_S, sigma_S = path.alpha(t_S), path.sigma(t_S)
    shrink = float(sigma_S[1] / sigma_S[0])
    area = float((alpha_S[2:] / sigma_S[2:]) @ torch.from_numpy(weights)) * (end - start) / 2
    constant = float(alpha_S[1]) - float(alpha_S[0]) * shrink
    return shrink, constant, (end - start) * float(alpha_S[1]) - float(sigma_S[1]) * area
