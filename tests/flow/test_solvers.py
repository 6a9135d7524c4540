"""Solvers: orders of convergence, exact samples of a linear-Gaussian problem, evaluation counts.

The network of these tests is the exact conditional expectation of its output, so a full solve must
return a draw from p(x1|c). Every solver is affine in the noise here, hence its mean and covariance
follow from D + 1 runs (noise 0 and each unit vector), with no Monte Carlo error.
"""

from dataclasses import replace

import pytest
import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import PATHS, PREDICTIONS, FlowConfig
from blip3o_lit.config.solver import SolverConfig, check_solver
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.path import path_named
from blip3o_lit.flow.solvers import integrate, sample, time_grid

MEAN_C = torch.tensor([[0.4, -1.0, 0.7], [0.0, 0.5, -0.3]])  # E[x1|c] = MEAN_C.T @ c
COVARIANCE = torch.tensor([[0.5, 0.2, 0.0], [0.2, 0.4, -0.1], [0.0, -0.1, 0.3]])
CONDITION = torch.tensor([[1.0, 2.0]])


class ExactNetwork:
    """E[output | x_t, c] for x1|c ~ N(m(c), S), with the mistakes that tests ask for."""

    def __init__(self, config: FlowConfig, sign: float = 1.0, reverse_time: bool = False):
        self.config, self.sign, self.reverse_time = config, sign, reverse_time
        self.path = path_named(config.path, config.sigma_min, config.sigma_max)
        self.encodings = 0

    def __call__(self, x_BND, t_B, condition):
        t = (1 - t_B if self.reverse_time else t_B).double()[0]
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        mean = (condition @ MEAN_C).double().unsqueeze(1)
        covariance = COVARIANCE.double()
        marginal = alpha**2 * covariance + sigma**2 * torch.eye(3).double()
        whitened = (x_BND.double() - alpha * mean) @ torch.linalg.inv(marginal)
        x1 = mean + alpha * whitened @ covariance
        z = sigma * whitened
        velocity = self.path.d_alpha(t) * x1 + self.path.d_sigma(t) * z
        out = {"velocity": velocity, "sample": x1, "noise": z}[self.config.prediction]
        return (self.sign * out).float()


def moments(config: FlowConfig, solver: SolverConfig, **mistakes):
    """Mean and covariance of what the solver returns, exactly."""
    noise = torch.cat([torch.zeros(1, 3), torch.eye(3)]).unsqueeze(1)
    network = ExactNetwork(config, **mistakes)
    x1 = sample(FlowObjective(config), network, CONDITION.expand(4, 2), noise, solver).x1_BND
    mean, columns = x1[0, 0], x1[1:, 0] - x1[0, 0]
    return mean, columns.T @ columns


def flow(path, prediction, **options):
    return FlowConfig(path=path, prediction=prediction, time_zero_share=0.0, **options)


def fine(prediction, name="rk4"):
    steps = 3 if name == "dopri5" else 100
    return SolverConfig(name=name, steps=steps, start=1e-3 if prediction == "noise" else 0.0)


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4", "ab2", "dopri5"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_samples_have_the_conditional_mean_and_covariance(path, prediction, name):
    solver = fine(prediction, name)
    if (path, prediction, name) == ("seed_cosine", "velocity", "ab2"):  # No estimate at t = 0.
        solver = replace(solver, start=1e-3)
    mean, covariance = moments(flow(path, prediction), solver)
    tolerance = 0.06 if name == "euler" else 6e-3
    torch.testing.assert_close(mean, (CONDITION @ MEAN_C)[0], rtol=0, atol=tolerance)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=tolerance)


@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_noise_left_at_the_end_stays_in_the_samples(prediction):
    config = flow("linear", prediction, sigma_min=0.3)
    mean, covariance = moments(config, fine(prediction))
    torch.testing.assert_close(mean, (CONDITION @ MEAN_C)[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(covariance, COVARIANCE + 0.09 * torch.eye(3), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_one_evaluation_is_the_posterior_mean_or_refused(path, prediction):
    config, solver = flow(path, prediction), SolverConfig(name="mean")
    if prediction == "noise" or (path, prediction) == ("seed_cosine", "velocity"):
        with pytest.raises(UserError, match="solver=mean.*flow.prediction=sample"):
            moments(config, solver)
        return
    mean, covariance = moments(config, solver)
    torch.testing.assert_close(mean, (CONDITION @ MEAN_C)[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(covariance, torch.zeros(3, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_torch_free_rules_agree_with_the_paths(path, prediction):
    zero = torch.zeros(1)
    config = flow(path, prediction)
    assert config.has_mean == bool(path_named(path).has_value(prediction, "sample", zero))
    if not path_named(path).has_value(prediction, "velocity", zero):
        with pytest.raises(UserError, match="set solver.start="):
            check_solver(config, SolverConfig(name="heun"))
    else:
        check_solver(config, SolverConfig(name="heun"))
    if not config.has_mean:
        with pytest.raises(UserError, match="flow.time_zero_share=0"):
            FlowConfig(path=path, prediction=prediction, time_zero_share=0.1)


@pytest.mark.parametrize("mistake", [{"sign": -1.0}, {"reverse_time": True}])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
@pytest.mark.parametrize("path", PATHS)
def test_a_flipped_sign_or_time_is_noticed(path, prediction, mistake):
    mean, covariance = moments(flow(path, prediction), fine(prediction), **mistake)
    wrong_mean = (mean - (CONDITION @ MEAN_C)[0]).abs().max()
    wrong_covariance = (covariance - COVARIANCE).abs().max()
    # Five times the tolerance; written so that nan counts as noticed. Reversed time passes through
    # the same slopes in another order, so there the mean alone shows it (0.045 to 0.8).
    assert not max(wrong_mean, wrong_covariance) < 0.03


def test_samples_of_a_seed_path_started_at_unit_noise_are_wrong():
    """The start is sigma(0) z; a unit start is what the seeds did."""
    config = flow("seed_linear", "velocity")
    unit = torch.cat([torch.zeros(1, 3), torch.eye(3)]).unsqueeze(1) / 2**0.5
    network, many = ExactNetwork(config), CONDITION.expand(4, 2)
    x1 = sample(FlowObjective(config), network, many, unit, fine("velocity")).x1_BND
    columns = x1[1:, 0] - x1[0, 0]
    torch.testing.assert_close(columns.T @ columns, COVARIANCE / 2, rtol=0, atol=6e-3)


@pytest.mark.parametrize("name", ["mean", "heun"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "scales",
    [
        {"velocity_scale": 0.1},
        {"output_scale": 0.1},
        {"velocity_scale": 0.1, "output_scale": 3.0},
        {"adaptive_scale": True},
        {"adaptive_scale": True, "velocity_scale": 0.1},
    ],
)
def test_scales_are_undone(prediction, scales, name):
    """A network that learned the scaled target exactly gives the samples of the unscaled one."""
    if (name, prediction) == ("mean", "noise"):
        return
    start = 0.1 if prediction == "noise" else 0.0
    solver = SolverConfig(name=name, steps=8, start=start)
    config = flow("linear", prediction, **scales)
    objective, noise = FlowObjective(config), torch.eye(3).unsqueeze(1)
    if config.adaptive_scale:
        objective.get_buffer("adaptive").fill_(2.5)
    plain_network = ExactNetwork(flow("linear", prediction))
    factor = config.velocity_scale / config.output_scale / (2.5 if config.adaptive_scale else 1)

    def network(x, t, condition):
        return factor * plain_network(x, t, condition)

    many = CONDITION.expand(3, 2)
    scaled = sample(objective, network, many, noise, solver).x1_BND
    plain_objective = FlowObjective(flow("linear", prediction))
    plain = sample(plain_objective, plain_network, many, noise, solver).x1_BND
    torch.testing.assert_close(scaled, plain, rtol=0, atol=1e-6)


def test_samples_come_back_in_the_scale_of_the_tokens():
    """target_norm_scale: the flow runs on 4 x1, its samples are x1; l2: they have unit norm."""
    noise = torch.eye(3).unsqueeze(1)
    for options, expected in (
        ({"target_norm_scale": 4.0}, lambda y: y / 4),
        ({"normalise": "l2"}, lambda y: y / y.norm(dim=-1, keepdim=True)),
    ):
        config = flow("linear", "velocity")
        network, solver = ExactNetwork(config), SolverConfig(name="euler", steps=3)
        many = CONDITION.expand(3, 2)
        plain = sample(FlowObjective(config), network, many, noise, solver, True)
        scaled_objective = FlowObjective(flow("linear", "velocity", **options))
        scaled = sample(scaled_objective, network, many, noise, solver, True)
        for y, x in zip(plain.intermediates, scaled.intermediates, strict=True):
            torch.testing.assert_close(x, expected(y))


class Guided(ExactNetwork):
    """Encodes its condition; zero condition tokens stand for no condition."""

    def encode(self, condition):
        return condition[:, 0]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("prediction", ["velocity", "sample"])
def test_guidance_extrapolates_from_no_condition_at_two_evaluations(prediction, scale):
    """At t = 0 the guided estimate is m0 + w (m(c) - m0), here with m0 = m(0) = 0."""
    config = flow("linear", prediction, condition_dropout=0.1)
    solver = SolverConfig(name="mean", guidance_scale=scale)
    condition = CONDITION.unsqueeze(1)
    result = sample(FlowObjective(config), Guided(config), condition, torch.ones(1, 1, 3), solver)
    expected = scale * CONDITION @ MEAN_C
    torch.testing.assert_close(result.x1_BND[0], expected, rtol=0, atol=1e-6)
    assert result.nfe == (1 if scale == 1 else 2)


def test_guided_evaluations_are_counted_and_untrained_guidance_is_refused():
    config = flow("linear", "velocity", condition_dropout=0.1)
    solver = SolverConfig(name="heun", steps=3, guidance_scale=2.0)
    condition = CONDITION.unsqueeze(1)
    network, noise = Guided(config), torch.ones(1, 1, 3)
    assert sample(FlowObjective(config), network, condition, noise, solver).nfe == 12
    with pytest.raises(UserError, match="flow.condition_dropout above 0"):
        check_solver(flow("linear", "velocity"), solver)


@pytest.mark.parametrize(
    ("method", "order"), [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4)]
)
@pytest.mark.parametrize("direction", [1, -1])
def test_order_of_convergence(method, order, direction):
    """dx/dt = x cos t - sin(2t)/2, solved by exp(sin t) + sin t + 1, both ways."""

    def field(x, t):
        t = torch.tensor(t, dtype=torch.float64)
        return x * t.cos() - (2 * t).sin() / 2

    def solution(t):
        t = torch.tensor([t], dtype=torch.float64)
        return t.sin().exp() + t.sin() + 1

    errors = []
    for steps in (20, 40, 80):
        grid = torch.linspace(0, 2, steps + 1, dtype=torch.float64).tolist()[::direction]
        end = integrate(field, solution(grid[0]), grid, method)[-1]
        errors.append((end - solution(grid[-1])).abs().item())
    slopes = [torch.tensor(a / b).log2().item() for a, b in zip(errors, errors[1:])]
    assert slopes[-1] == pytest.approx(order, abs=0.15), (errors, slopes)


def test_dopri5_meets_its_tolerance():
    def field(x, t):
        return -3 * x

    start = torch.ones(1, dtype=torch.float64)
    for tolerance in (1e-3, 1e-6):
        grid = [0.0, 0.5, 1.0]
        states = integrate(field, start, grid, "dopri5", rtol=tolerance, atol=tolerance)
        for t, state in zip(grid[1:], states, strict=True):
            assert abs(state.item() - torch.tensor(-3 * t).exp().item()) < 3 * tolerance


# Evaluations of S steps: a singular end costs the last step of heun and rk4 all but one.
COUNTS = [
    ("mean", "sample", 1),
    ("mean", "velocity", 1),
    ("euler", "velocity", 5),
    ("euler", "sample", 5),
    ("midpoint", "velocity", 10),
    ("midpoint", "sample", 10),
    ("heun", "velocity", 10),
    ("heun", "sample", 9),
    ("rk4", "velocity", 20),
    ("rk4", "sample", 17),
    ("ab2", "velocity", 5),
    ("ab2", "sample", 5),
]


class Counted(ExactNetwork):
    """Counts its own calls, the times it saw, and how often the condition was encoded."""

    def __init__(self, config):
        super().__init__(config)
        self.times = []

    def __call__(self, x_BND, t_B, condition):
        self.times.append(t_B[0].item())
        assert isinstance(condition, tuple)
        return super().__call__(x_BND, t_B, condition[0])

    def encode(self, condition):
        self.encodings += 1
        return (condition,)


@pytest.mark.parametrize(("name", "prediction", "evaluations"), COUNTS)
def test_evaluations_are_counted_exactly_and_the_condition_encoded_once(
    name, prediction, evaluations
):
    config = flow("linear", prediction)
    network, solver = Counted(config), SolverConfig(name=name, steps=5)
    noise = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
    result = sample(FlowObjective(config), network, CONDITION.expand(2, 2), noise, solver, True)
    assert result.nfe == evaluations == len(network.times)
    assert network.encodings == 1
    assert len(result.intermediates) == (1 if name == "mean" else 5)
    assert torch.equal(result.intermediates[-1], result.x1_BND)
    assert max(network.times) < 1 or prediction == "velocity"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dopri5_counts_its_evaluations_and_keeps_the_grid_points(prediction):
    config = flow("linear", prediction)
    network = Counted(config)
    solver = SolverConfig(name="dopri5", steps=5, start=1e-3 if prediction == "noise" else 0.0)
    noise = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(0))
    objective, condition = FlowObjective(config), CONDITION.expand(2, 2)
    result = sample(objective, network, condition, noise, solver, True)
    assert result.nfe == len(network.times) > 6
    direct = sample(objective, Counted(config), condition, noise, solver)
    assert direct.intermediates == []
    torch.testing.assert_close(direct.x1_BND, result.x1_BND, rtol=0, atol=2e-3)


def test_the_last_step_of_a_sample_output_returns_the_estimate_itself():
    config = flow("trigonometric", "sample")
    network = ExactNetwork(config)
    solver = SolverConfig(name="heun", steps=4)
    noise = torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(0))
    result = sample(FlowObjective(config), network, CONDITION, noise, solver, True)
    last = FlowObjective(config).estimate(
        network, CONDITION, result.intermediates[-2], torch.tensor([0.75])
    )
    torch.testing.assert_close(result.x1_BND, last)


def test_grids_run_from_the_start_to_one():
    for grid in ("uniform", "cosine", "shift"):
        times = time_grid(SolverConfig(name="euler", steps=8, grid=grid, shift=3.0, start=0.2))
        assert times[0] == pytest.approx(0.2)
        assert times[-1] == pytest.approx(1.0)
        assert len(times) == 9
        assert all(a < b for a, b in zip(times, times[1:]))
    cosine = time_grid(SolverConfig(name="euler", steps=8, grid="cosine"))
    shift = time_grid(SolverConfig(name="euler", steps=8, grid="shift", shift=3.0))
    assert cosine[1] == pytest.approx(0.0380602337)  # (1 - cos(pi/8)) / 2
    assert shift[1] == pytest.approx(1 - 3 * 0.875 / (1 + 2 * 0.875))


def test_each_row_of_a_batch_follows_its_own_condition():
    """Batch rows are independent: each row's mean follows its own condition."""
    config = flow("linear", "sample")
    condition = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    solver = SolverConfig(name="mean")
    result = sample(
        FlowObjective(config), ExactNetwork(config), condition, torch.ones(5, 1, 3), solver
    )
    torch.testing.assert_close(result.x1_BND[:, 0], condition @ MEAN_C)
