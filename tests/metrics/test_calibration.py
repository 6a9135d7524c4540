"""Calibration figures of exact, too narrow and collapsed samplers of a known Gaussian."""

import pytest
import torch

from blip3o_lit.metrics.calibration import Calibration


def measured(spread: float, k: int = 4) -> dict:
    draw = torch.Generator().manual_seed(0)
    metric = Calibration(k)
    for _ in range(4):
        mean = torch.randn(50, 10, 6, generator=draw)
        true = mean + torch.randn(mean.shape, generator=draw)
        samples = mean + spread * torch.randn(k, *mean.shape, generator=draw)
        metric.update(samples, mean, true)
    return metric.compute()


def test_exact_samples_meet_every_expected_figure():
    found = measured(1.0)
    assert found["mse_ratio"] == pytest.approx(2, rel=0.03)
    assert found["mean_of_samples_mse_ratio"] == pytest.approx(1.25, rel=0.03)
    assert found["coverage"] == pytest.approx(3 / 5, abs=0.02)
    assert found["coverage_expected"] == 3 / 5
    assert found["spread_skill"] == pytest.approx(1, rel=0.03)
    # For unit mean and unit spread each pair has cosine 1/2, up to the small width.
    assert found["pairwise_cosine"] == pytest.approx(0.5, abs=0.06)
    assert found["mean_of_samples_cosine"] > found["pairwise_cosine"]


def test_a_narrow_sampler_is_caught():
    found = measured(0.3)
    assert found["mse_ratio"] < 1.2
    assert found["coverage"] < 0.3
    assert found["spread_skill"] < 0.5
    assert measured(0.0)["pairwise_cosine"] == pytest.approx(1)


def test_one_sample_has_no_diversity():
    with pytest.raises(ValueError, match="two samples"):
        Calibration(1)
