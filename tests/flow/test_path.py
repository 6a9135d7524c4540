"""Paths: derivatives against autograd, conversions as inverses, and what has no value refused."""

import itertools

import pytest
import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import PATHS, PREDICTIONS
from blip3o_lit.flow.path import path_named

SIGMAS = ((0.0, 1.0), (1e-4, 1.0), (0.05, 0.7))
CASES = [(name, *sigmas) for name in PATHS for sigmas in SIGMAS]


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    x1, z = (torch.randn(6, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    t = torch.tensor([0.02, 0.2, 0.4, 0.6, 0.8, 0.98], dtype=torch.float64)
    return x1, z, t


@pytest.mark.parametrize(("name", "low", "high"), CASES)
def test_derivatives_are_those_of_the_coefficients(name, low, high):
    path = path_named(name, low, high)
    t = torch.linspace(0, 0.999, 40, dtype=torch.float64, requires_grad=True)
    for curve, slope in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        (expected,) = torch.autograd.grad(curve(t).sum(), t)
        torch.testing.assert_close(slope(t), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", PATHS)
def test_the_slope_of_sigma_has_its_limit_where_sigma_vanishes(name):
    path = path_named(name, 0.0, 1.0)
    one = torch.ones(1, dtype=torch.float64)
    before = one - 1e-6
    assert path.sigma(one) == 0
    torch.testing.assert_close(path.d_sigma(one), path.d_sigma(before), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("name", "low", "high"), CASES)
def test_end_points(name, low, high):
    path = path_named(name, low, high)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    start = (1 + high**2) ** 0.5 if name.startswith("seed") else 1.0
    left = low if name != "trigonometric" else 0.0
    torch.testing.assert_close(path.alpha(ends), ends)
    expected = torch.tensor([start, left], dtype=torch.float64)
    torch.testing.assert_close(path.sigma(ends), expected)


@pytest.mark.parametrize(("name", "low", "high"), CASES)
def test_velocity_is_the_time_derivative_of_the_interpolation(pair, name, low, high):
    x1, z, t = pair
    path = path_named(name, low, high)
    step = 1e-6
    difference = (path.interpolate(x1, z, t + step) - path.interpolate(x1, z, t - step)) / 2 / step
    torch.testing.assert_close(path.velocity(x1, z, t), difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "low", "high"), CASES)
def test_every_output_gives_back_the_pair_and_its_velocity(pair, name, low, high):
    x1, z, t = pair
    path = path_named(name, low, high)
    x = path.interpolate(x1, z, t)
    for prediction in PREDICTIONS:
        out = path.output(prediction, x1, z, t)
        torch.testing.assert_close(path.x1_from(prediction, out, x, t), x1, rtol=1e-8, atol=1e-8)
        velocity = path.velocity_from(prediction, out, x, t)
        torch.testing.assert_close(velocity, path.velocity(x1, z, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("first", "second"), itertools.permutations(PREDICTIONS, 2))
@pytest.mark.parametrize("name", PATHS)
def test_conversions_are_inverse_for_outputs_that_no_pair_made(pair, name, first, second):
    out, x, t = pair
    path = path_named(name, 0.05, 0.7)
    x1 = path.x1_from(first, out, x, t)
    noise = (x - path.alpha(t)[:, None, None] * x1) / path.sigma(t)[:, None, None]
    there = path.output(second, x1, noise, t)
    torch.testing.assert_close(path.x1_from(second, there, x, t), x1, rtol=1e-8, atol=1e-8)
    velocity = path.velocity_from(first, out, x, t)
    torch.testing.assert_close(path.velocity_from(second, there, x, t), velocity)


# What has no value at t = 0, then at t = 1 with sigma(1) = 0: the table of decision 5.
NO_X1_AT_0 = {(name, "noise") for name in PATHS} | {("seed_cosine", "velocity")}
NO_VELOCITY_AT_0 = {(name, "noise") for name in PATHS}
NO_VELOCITY_AT_1 = {(name, "sample") for name in PATHS}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_what_has_no_value_is_refused_and_all_else_is_finite(name, prediction):
    path = path_named(name, 0.0, 1.0)
    out, x = torch.ones(2, 1, 3), torch.ones(2, 1, 3)
    for read, time, refused in (
        (path.x1_from, 0.0, NO_X1_AT_0),
        (path.x1_from, 1.0, set()),
        (path.velocity_from, 0.0, NO_VELOCITY_AT_0),
        (path.velocity_from, 1.0, NO_VELOCITY_AT_1),
    ):
        t = torch.tensor([0.5, time])
        if (name, prediction) in refused:
            with pytest.raises(UserError, match=f"flow.prediction={prediction}.*use flow"):
                read(prediction, out, x, t)
        else:
            assert read(prediction, out, x, t).isfinite().all()


def test_an_unknown_path_names_the_nearest():
    with pytest.raises(UserError, match="did you mean flow.path=trigonometric"):
        path_named("trigonometrical")


def test_the_trigonometric_path_runs_along_the_sphere():
    """Spherical flow's slerp of unit tokens: the same arc where noise and data are orthogonal.

    Random directions of 1024 channels are so to 3 %, so the path keeps its distance from 0.
    """
    generator = torch.Generator().manual_seed(0)
    noise, data = (torch.randn(64, 1024, generator=generator) for _ in range(2))
    noise, data = (side / side.norm(dim=-1, keepdim=True) for side in (noise, data))
    path, t = path_named("trigonometric"), torch.rand(64, generator=generator)
    angle = (noise * data).sum(-1).arccos()[:, None]
    away = [torch.sin((1 - t)[:, None] * angle), torch.sin(t[:, None] * angle)]
    slerp = (away[0] * noise + away[1] * data) / angle.sin()
    made = path.interpolate(data, noise, t)
    assert torch.cosine_similarity(made, slerp, dim=-1).min() > 0.999
    assert (made.norm(dim=-1) - 1).abs().max() < 0.06
    straight = path_named("linear").interpolate(data, noise, t)
    assert straight.norm(dim=-1).min() < 0.75  # the straight line cuts through the ball
    data = data - (data * noise).sum(-1, keepdim=True) * noise
    data = data / data.norm(dim=-1, keepdim=True)
    assert (path.interpolate(data, noise, t).norm(dim=-1) - 1).abs().max() < 1e-5
