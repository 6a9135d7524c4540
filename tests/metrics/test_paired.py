"""The paired test: exact p values for few images, uniform ones when nothing differs."""

from itertools import product

import numpy as np
import pytest

from blip3o_lit.metrics.paired import compare


def test_p_value_is_that_of_all_sign_patterns():
    difference = np.array([0.3, 0.1, 0.4, -0.05, 0.2, 0.15])
    result = compare(difference, np.zeros(6))
    means = [abs(np.mean(np.array(signs) * difference)) for signs in product((-1, 1), repeat=6)]
    exact = np.mean([mean >= difference.mean() - 1e-12 for mean in means])
    assert result["p_value"] == pytest.approx(exact, abs=0.01)
    assert result["difference"] == pytest.approx(difference.mean())
    assert result["wins"] == pytest.approx(5 / 6)
    assert result["ci95"][0] < difference.mean() < result["ci95"][1]


def test_equal_models_and_a_clear_winner():
    scores = np.random.default_rng(0).normal(0.8, 0.1, 300)
    assert compare(scores, scores)["p_value"] == 1
    better = compare(scores + 0.002, scores + np.random.default_rng(1).normal(0, 0.005, 300))
    # Pairing sees a difference of 0.002 that the spread of 0.1 over images would hide.
    assert better["p_value"] < 0.001
    assert better["ci95"][0] > 0


def test_p_values_of_equal_models_are_uniform():
    draws = np.random.default_rng(2)
    values = [
        compare(draws.normal(size=30), draws.normal(size=30), seed)["p_value"] for seed in range(60)
    ]
    assert np.mean(np.array(values) < 0.2) == pytest.approx(0.2, abs=0.12)
    assert np.mean(values) == pytest.approx(0.5, abs=0.12)
