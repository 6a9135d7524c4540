"""Cosine by token norm: outlier tokens are counted apart."""

import pytest
import torch

from blip3o_lit.metrics.norms import CosineByNorm


def test_outlier_tokens_are_counted_apart():
    true = torch.ones(2, 20, 4)
    true[:, 3] *= 10
    true[:, 4] *= 0.5
    generated = true.clone()
    generated[:, 3] = torch.tensor([10.0, -10.0, 10.0, -10.0])  # orthogonal to the truth
    generated[:, 4] *= 3
    metric = CosineByNorm()
    metric.update(generated[:1], true[:1])
    metric.update(generated[1:], true[1:])
    rows = {(row["from"], row["to"]): row for row in metric.compute()}
    assert set(rows) == {(0.0, 0.8), (0.8, 1.25), (2.0, None)}
    assert rows[2.0, None]["share"] == pytest.approx(1 / 20)
    assert rows[2.0, None]["cosine"] == pytest.approx(0, abs=1e-12)
    assert rows[0.8, 1.25]["cosine"] == pytest.approx(1)
    assert rows[0.0, 0.8]["norm_ratio"] == pytest.approx(3)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_zero_tokens_stay_finite():
    metric = CosineByNorm()
    metric.update(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
    assert metric.compute()[0]["cosine"] == 0
