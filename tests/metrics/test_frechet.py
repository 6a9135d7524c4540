"""The Frechet distance against scipy's matrix square root and the closed form of Gaussians."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from blip3o_lit.metrics.frechet import Moments, frechet_distance


def moments(vectors: torch.Tensor) -> Moments:
    metric = Moments(vectors.shape[1])
    for part in vectors.split(100):
        metric.update(part)
    return metric


def vectors(seed: int, images: int = 500, width: int = 6) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=draw)
    return torch.randn(images, width, generator=draw) @ mix + torch.randn(width, generator=draw)


def test_moments_equal_numpy_even_beside_an_outlier_channel():
    x = vectors(0) + torch.tensor([1e4, 0, 0, 0, 0, 0])
    mean, cov = moments(x).compute()
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x.double().numpy().T), rtol=1e-6, atol=1e-7)


def test_distance_equals_the_matrix_square_root():
    a, b = moments(vectors(1)).compute(), moments(vectors(2)).compute()
    root = sqrtm(a[1].numpy() @ b[1].numpy()).real
    expected = ((a[0] - b[0]) ** 2).sum() + np.trace(a[1].numpy() + b[1].numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_one_channel_closed_form():
    a = (torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    b = (torch.tensor([3.0]).double(), torch.tensor([[25.0]]).double())
    assert frechet_distance(a, b) == pytest.approx((3 - 1) ** 2 + (5 - 2) ** 2)


def test_rank_deficient_covariances_are_finite():
    a, b = moments(vectors(3, 4, 20)).compute(), moments(vectors(4, 4, 20)).compute()
    assert np.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, b) >= 0


def test_one_vector_has_no_covariance():
    with pytest.raises(ValueError, match="two vectors"):
        moments(torch.zeros(1, 3)).compute()
