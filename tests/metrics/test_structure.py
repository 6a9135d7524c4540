"""Linear CKA and mutual nearest neighbours against slow definitions and known values."""

from itertools import permutations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from blip3o_lit.metrics.structure import LinearCka, MutualNeighbours, unbiased_hsic


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def test_unbiased_hsic_is_the_average_over_distinct_indices():
    k, m = (v @ v.T for v in (normal(0, 6, 3), normal(1, 6, 4)))
    pairs = [k[i, j] * m[i, j] for i, j in permutations(range(6), 2)]
    quads = [k[i, j] * m[q, r] for i, j, q, r in permutations(range(6), 4)]
    triples = [k[i, j] * m[i, q] for i, j, q in permutations(range(6), 3)]
    expected = sum(pairs) / len(pairs) + sum(quads) / len(quads) - 2 * sum(triples) / len(triples)
    assert float(unbiased_hsic(k[None], m[None])) == pytest.approx(float(expected), rel=1e-10)


def cka(x: torch.Tensor, y: torch.Tensor, groups: int) -> float:
    metric = LinearCka()
    for a, b in zip(x.chunk(groups), y.chunk(groups)):
        metric.update(a[None], b[None])
    value = metric.compute()
    assert value is not None
    return value


def test_cka_is_one_under_rotation_and_scale_and_zero_for_unrelated_vectors():
    x = normal(2, 512, 64)
    rotation = torch.linalg.qr(normal(3, 64, 64)).Q
    assert cka(x, 3 * x @ rotation + 5, 16) == pytest.approx(1, abs=1e-9)
    # The biased estimate at 32 vectors of 64 channels would be about 0.66.
    assert abs(cka(x, normal(4, 512, 64), 16)) < 0.03


def test_cka_does_not_depend_on_the_group_size():
    x = normal(5, 1024, 8)
    y = x + normal(6, 1024, 8)
    assert cka(x, y, 32) == pytest.approx(cka(x, y, 2), abs=0.03)


def test_tokens_of_several_images_are_groups_of_their_own():
    x, y = normal(7, 3, 10, 4), normal(8, 3, 10, 5)
    together, apart = LinearCka(), LinearCka()
    together.update(x, y)
    for a, b in zip(x, y):
        apart.update(a[None], b[None])
    assert together.compute() == pytest.approx(apart.compute(), rel=1e-12)


def test_constant_vectors_and_small_groups_have_no_alignment():
    metric = LinearCka()
    metric.update(normal(9, 1, 3, 4), normal(10, 1, 3, 4))
    assert metric.compute() is None
    metric.update(torch.ones(1, 8, 4), normal(11, 1, 8, 4))
    assert metric.compute() is None


def test_mutual_neighbours_equal_scikit_learn():
    x = normal(12, 80, 6)
    y = x + 0.7 * normal(13, 80, 6)
    metric = MutualNeighbours(7)
    metric.update(x[:50], y[:50])
    metric.update(x[50:], y[50:])
    found = []
    for v in (x.numpy(), y.numpy()):
        v = v / np.linalg.norm(v, axis=1, keepdims=True)
        found.append(NearestNeighbors(n_neighbors=8).fit(v).kneighbors(v)[1][:, 1:])
    expected = np.mean([len(set(a) & set(b)) / 7 for a, b in zip(*found)])
    assert metric.compute() == pytest.approx(expected, abs=1e-9)
    assert 0.1 < expected < 0.9
    few = MutualNeighbours(7)
    few.update(x[:8], y[:8])
    assert few.compute() is None
