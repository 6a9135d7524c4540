"""The multistep solver: its order, exactness, and what few steps keep of a Gaussian target."""

import itertools
import math

import pytest
import torch

from blip3o_lit.cli.command import composed
from blip3o_lit.config.commands import GenerateConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import PATHS, FlowConfig
from blip3o_lit.config.solver import SolverConfig, check_solver, solver_from_label
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.flow.multistep import coefficients, multistep
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.path import path_named
from blip3o_lit.flow.solvers import sample

VARIANCES = torch.logspace(-2, 0, 9, dtype=torch.float64)


def estimate(path, x, t):
    """E[x1 | x_t] for x1 ~ N(0, variance), one variance a channel."""
    t = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    return alpha * VARIANCES * x / (alpha**2 * VARIANCES + sigma**2)


def kept(steps, solver="ab2", **grid):
    """The standard deviation that samples keep, over the target's: 1 is exact."""
    objective = FlowObjective(FlowConfig())

    def network(x_BND, t_B, condition):
        return estimate(objective.path, x_BND, float(t_B[0]))

    config = SolverConfig(name=solver, steps=steps, **grid)
    noise_BND = torch.ones(1, 1, len(VARIANCES))
    made = sample(objective, network, None, noise_BND, config)
    return made.x1_BND[0, 0] / VARIANCES.sqrt()


@pytest.mark.parametrize("name", PATHS)
def test_the_order_is_two(name):
    path = path_named(name)
    # The exact solution from t = 0: x_t / sigma_t's law scales with the marginal deviation.
    errors = []
    for steps in (64, 128, 256):
        grid = torch.linspace(0, 0.9, steps + 1, dtype=torch.float64).tolist()
        start = path.sigma(torch.zeros(1, dtype=torch.float64)).expand(9)
        end = multistep(lambda x, t: estimate(path, x, t), path, start, grid)[-1]
        t = torch.tensor(0.9, dtype=torch.float64)
        exact = (path.alpha(t) ** 2 * VARIANCES + path.sigma(t) ** 2).sqrt()
        errors.append(float((end - exact).abs().max()))
    slopes = [torch.tensor(a / b).log2().item() for a, b in itertools.pairwise(errors)]
    assert slopes[-1] == pytest.approx(2, abs=0.15), (errors, slopes)


def test_steps_are_exact_where_the_estimate_is_linear_in_time():
    """dx/dt = (D(t) - x) / (1 - t) with D(t) = 2 + 3 t, solved by x_t = (1 - t) x_0 + integral."""
    path = path_named("linear")
    one = torch.ones(1, dtype=torch.float64)
    grid = [0.0, 0.2, 0.5, 0.6, 1.0]
    states = multistep(lambda x, t: (2 + 3 * t) * one, path, one, grid)
    # The first step holds D at 2; from there on the solution is exact. An antiderivative of
    # D(t) / (1 - t)^2 is 5 / (1 - t) + 3 log(1 - t).
    begin, first = grid[1], states[0]
    for end, state in zip(grid[2:-1], states[1:]):
        left, ago = 1 - end, 1 - begin
        pulled = left * (5 / left + 3 * math.log(left) - 5 / ago - 3 * math.log(ago))
        torch.testing.assert_close(state, left / ago * first + pulled, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(states[-1], 5 * one)


@pytest.mark.parametrize("name", PATHS)
def test_the_coefficients_of_one_step_add_up(name):
    """A state that is alpha x1 + sigma z with a constant estimate x1 stays on its path."""
    path = path_named(name)
    t = torch.tensor([0.3, 0.8], dtype=torch.float64)
    shrink, constant, linear = coefficients(path, 0.3, 0.8)
    (alpha_a, alpha_b), (sigma_a, sigma_b) = path.alpha(t).tolist(), path.sigma(t).tolist()
    assert shrink * sigma_a == pytest.approx(sigma_b)
    assert shrink * alpha_a + constant == pytest.approx(alpha_b)
    w = torch.linspace(0.3, 0.8, 100001, dtype=torch.float64)
    ratio = path.alpha(w) / path.sigma(w)
    moved = sigma_b * torch.trapezoid(w - 0.3, ratio).item()
    assert linear == pytest.approx(moved, rel=1e-6)


def test_four_steps_keep_far_more_of_the_deviation_than_four_euler_steps():
    own = SolverConfig.named("ab2")
    ours = kept(4, grid=own.grid, shift=own.shift)
    euler = kept(4, "euler")
    assert float((ours - 1).abs().max()) < 0.22
    assert float((ours - 1).abs().mean()) < 0.08
    assert 0.27 < float(euler.min()) < float(euler.max()) < 0.73
    six = kept(6, grid=own.grid, shift=own.shift)
    assert float((six - 1).abs().max()) < 0.06


@pytest.mark.parametrize("name", ["mean", "euler", "midpoint", "heun", "rk4", "ab2", "dopri5"])
def test_the_label_means_the_solver_of_the_file(name):
    config = composed("train", TrainConfig, [f"solver={name}"]).solver
    assert solver_from_label(config.label) == config == SolverConfig.named(name, steps=config.steps)


def test_a_label_gives_the_steps():
    assert solver_from_label("ab2-8") == SolverConfig.named("ab2", steps=8)
    fitted = composed(
        "generate", GenerateConfig, ["ckpt=RUN", "tokens=A", "out=B", "solver=fitted"]
    )
    assert solver_from_label("fitted-4") == fitted.solver


def test_an_output_without_an_estimate_at_the_start_is_refused():
    config = FlowConfig(path="seed_cosine", prediction="velocity", time_zero_share=0.0)
    with pytest.raises(UserError, match="solver=ab2.*solver.start=0.2"):
        check_solver(config, SolverConfig.named("ab2"))
    check_solver(config, SolverConfig.named("ab2", start=0.2))
