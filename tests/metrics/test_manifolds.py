"""Precision and recall by neighbours: sets inside, beside and narrower than another."""

import pytest
import torch

from blip3o_lit.metrics.manifolds import Manifolds


def scores(samples_BD, true_CD):
    metric = Manifolds()
    for part in samples_BD.split(300):  # in batches, and sets of different sizes
        metric.update(part, true_CD[:0])
    metric.update(samples_BD[:0], true_CD)
    return metric.compute()


def normal(count, seed):
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def test_a_set_is_inside_itself_and_outside_a_distant_one():
    true = normal(400, 0)
    assert scores(true, true) == {"precision": 1.0, "recall": 1.0}
    assert scores(true + 100, true) == {"precision": 0.0, "recall": 0.0}


def test_one_mode_of_two_is_precise_and_recalls_its_share():
    true = torch.cat([normal(300, 0), normal(200, 1) + 50])
    one = scores(normal(400, 2), true)
    both = scores(torch.cat([normal(240, 2), normal(160, 3) + 50]), true)
    assert one["precision"] == pytest.approx(both["precision"], abs=0.04)
    assert one["precision"] > 0.8
    assert one["recall"] == pytest.approx(0.6 * both["recall"], abs=0.05)


def test_the_mean_is_precise_and_recalls_little():
    narrow = scores(0.2 * normal(400, 0), normal(400, 1))
    assert narrow["precision"] > 0.95
    assert narrow["recall"] < 0.1


def test_by_hand_on_a_line():
    true, samples = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([[3.9], [4.1], [9.0]])
    metric = Manifolds(neighbours=1)  # balls: radius 1 around 0, 1 and 2, and 8 around 10
    metric.update(samples, true)
    # The samples' balls: 0.2, 0.2 and 4.9 wide.
    assert metric.compute() == {"precision": 1.0, "recall": 0.25}


def test_few_vectors_have_none():
    metric = Manifolds()
    metric.update(torch.zeros(3, 2), torch.zeros(9, 2))
    assert metric.compute() == {}
