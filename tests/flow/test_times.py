"""Training times: histograms against the densities, the shift, and the share at t = 0."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.flow.times import shifted, training_times

COUNT = 40000


def draw(**options):
    uniforms = torch.rand(COUNT, 2, generator=torch.Generator().manual_seed(0)).clamp_min(1e-7)
    return training_times(uniforms, FlowConfig(**{"time_zero_share": 0.0, **options})).numpy()


def logit_normal(mean, std):
    return lambda t: stats.norm.cdf((np.log(t / (1 - t)) - mean) / std)


@pytest.mark.parametrize(
    ("options", "distribution"),
    [
        ({"time": "uniform"}, stats.uniform.cdf),
        ({"time": "u_shaped"}, stats.beta(0.5, 0.5).cdf),
        ({"time": "logit_normal"}, logit_normal(0, 1)),
        (
            {"time": "logit_normal", "time_mean": -0.8, "time_std": 0.8},
            logit_normal(-0.8, 0.8),
        ),
        # sigma' = s sigma / (1 + (s - 1) sigma), so P(t' < x) = P(sigma > sigma(x)).
        ({"time_shift": 4.0}, lambda t: 1 - (1 - t) / (4 - 3 * (1 - t))),
    ],
)
def test_times_follow_their_density(options, distribution):
    statistic = stats.kstest(draw(**options), distribution).statistic
    assert statistic < 1.63 / math.sqrt(COUNT)  # the 1 % point of Kolmogorov's statistic


def test_another_density_is_told_apart():
    statistic = stats.kstest(draw(time="u_shaped"), stats.uniform.cdf).statistic
    assert statistic > 5 * 1.63 / math.sqrt(COUNT)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_at_exactly_zero_leaves_the_rest_as_it_was(share):
    t, plain = draw(time_zero_share=share), draw()
    zero = t == 0
    assert abs(zero.mean() - share) < 0.01
    np.testing.assert_array_equal(t[~zero], plain[~zero])


def test_a_shift_above_one_favours_noise_and_its_reciprocal_undoes_it():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert (shifted(t, 3.0)[1:-1] < t[1:-1]).all()
    torch.testing.assert_close(shifted(shifted(t, 3.0), 1 / 3), t)


@pytest.mark.parametrize("time", ["uniform", "logit_normal", "u_shaped"])
def test_no_draw_is_singular(time):
    edges = torch.tensor([[2.0**-24, 0.9], [1 - 2.0**-24, 0.9]])
    t = training_times(edges, FlowConfig(time=time, time_std=50.0, time_zero_share=0.0))
    assert t.dtype == torch.float32
    assert (t > 0).all()
    assert (t < 1).all()
