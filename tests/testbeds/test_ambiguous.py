"""The ambiguous testbed: its law, exact samples that cover it, and regressors that cannot."""

from dataclasses import replace

import pytest
import torch
from made_run import make_run, small_config

from blip3o_lit import BLIP3oInference
from blip3o_lit.config.data import AmbiguousConfig, DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.testbeds.ambiguous import ambiguous_store, coverage, draw
from blip3o_lit.testbeds.law import Problem
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

CONFIG = AmbiguousConfig(images=64, validation_images=4096)


@pytest.fixture
def validation(tmp_path_factory, monkeypatch):
    """Store, condition and target of the validation split, built once for the file."""
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path_factory.getbasetemp() / "home"))
    store = ambiguous_store(CONFIG)
    reader = TokenReader(TokenStore.open(str(store)), "validation", "eva", "clip", ModeConfig())
    tokens = reader.read(torch.arange(len(reader)).numpy())
    return store, tokens["condition"].double(), tokens["target"].double()


def test_modes_stand_at_the_asked_distance_and_are_centred():
    problem = draw(CONFIG)
    whitened = torch.linalg.solve(torch.linalg.cholesky(problem.covariance_DD), problem.modes_KD.T)
    distances = torch.pdist(whitened.T)
    torch.testing.assert_close(distances, torch.full_like(distances, 6.0))
    assert (problem.weights_K @ problem.modes_KD).abs().max() < 1e-12


def test_true_tokens_and_exact_samples_cover_every_mode(validation):
    store, condition, target = validation
    drawn = Problem.load(store).posterior_sample(condition, torch.Generator().manual_seed(0))
    for tokens in (target, drawn):
        scores = coverage(store, condition, tokens)
        assert scores["weights"] == pytest.approx([0.5, 0.3, 0.2])
        assert scores["covered"] == 3
        assert scores["weight_error"] < 0.03  # four standard errors of a share over 4096 images
        assert scores["spread"] == pytest.approx(1.0, abs=0.01)
        assert scores["agreement"] > 0.99


def test_the_optimal_regressor_covers_one_mode_and_has_the_least_error(validation):
    store, condition, target = validation
    problem = Problem.load(store)
    mean = problem.posterior_mean(condition)
    scores = coverage(store, condition, mean)
    assert scores["covered"] == 1
    assert scores["weight_error"] == pytest.approx(0.5)
    sample = problem.posterior_sample(condition, torch.Generator().manual_seed(0))
    error = float((mean - target).square().mean())
    sample_error = float((sample - target).square().mean())
    assert error == pytest.approx(problem.token_error(), rel=0.02)
    assert sample_error == pytest.approx(2 * error, rel=0.03)


@pytest.mark.parametrize("failure", ["one_mode", "equal_weights", "token_by_token", "blurred"])
def test_each_way_to_fail_shows_in_its_figure(validation, failure):
    store, condition, target = validation
    problem, random = Problem.load(store), torch.Generator().manual_seed(0)
    shape = target.shape[:2]
    within = target - problem.posterior_mean(condition)
    nearest = torch.cdist(within.mean(1), problem.modes_KD).argmin(1)
    centred = target - problem.modes_KD[nearest].unsqueeze(1)
    if failure == "one_mode":
        scores = coverage(store, condition, centred + problem.modes_KD[1])
        assert scores["covered"] == 1
    elif failure == "equal_weights":
        mode = torch.randint(3, (len(target), 1), generator=random)
        scores = coverage(store, condition, centred + problem.modes_KD[mode])
        assert scores["weight_error"] == pytest.approx(0.5 - 1 / 3, abs=0.03)
    elif failure == "token_by_token":
        mode = torch.multinomial(problem.weights_K, shape.numel(), True, generator=random)
        scores = coverage(store, condition, centred + problem.modes_KD[mode.reshape(shape)])
        assert scores["agreement"] < 0.7
    else:
        noise = torch.randn(target.shape, generator=random, dtype=torch.float64)
        factor = torch.linalg.cholesky(problem.covariance_DD)
        scores = coverage(store, condition, target + noise @ factor.T)
        assert scores["spread"] == pytest.approx(2.0, abs=0.05)


def test_an_evaluation_says_who_covers_the_modes(monkeypatch, tmp_path):
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path))
    problem = AmbiguousConfig(images=256, validation_images=512)
    config = replace(small_config(), data=DataConfig(name="ambiguous", ambiguous=problem))
    run = make_run(tmp_path / "run", ambiguous_store(problem), config)
    settings = {"baselines": "cheap", "solvers": ["euler-2"], "curve": [], "samples": 1}
    result = BLIP3oInference(run, "cpu").evaluate_model(**settings)
    scores = result["coverage"]
    assert set(scores) == {
        *("mean", "euler-2", "mean_token", "ridge", "optimum mean", "optimum sample")
    }
    assert scores["optimum sample"]["covered"] == 3
    assert scores["ridge"]["covered"] == scores["optimum mean"]["covered"] == 1
    best = result["optimum"]
    assert best["sample"]["mse"] == pytest.approx(best["sample"]["expected_mse"], rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [0.5, 0.6]}, "data.ambiguous.weights"),
        ({"weights": [1.0, 0.0]}, "data.ambiguous.weights"),
        ({"weights": []}, "data.ambiguous.weights"),
        ({"target_width": 2}, "data.ambiguous.target_width=2"),
        ({"separation": 0.0}, "data.ambiguous.separation"),
    ],
)
def test_impossible_problems_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        AmbiguousConfig(**options)
