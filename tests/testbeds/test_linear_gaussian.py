"""The linear-Gaussian testbed: stored tokens follow the stated law, and its optimum is right."""

import pytest
import torch
from safetensors.torch import load_file

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.data import LinearGaussianConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.testbeds.law import Problem
from blip3o_lit.testbeds.linear_gaussian import draw, linear_gaussian_store
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

SMALL = LinearGaussianConfig(images=1024, validation_images=256)


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch):
    """One cache for the whole file."""
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path_factory.getbasetemp() / "home"))


def read(store, split):
    reader = TokenReader(TokenStore.open(str(store)), split, "eva", "clip", ModeConfig())
    tokens = reader.read(torch.arange(len(reader)).numpy())
    return tokens["condition"].double(), tokens["target"].double()


@pytest.mark.parametrize("outliers", [0, 2])
def test_stored_tokens_follow_the_stated_law(outliers):
    config = LinearGaussianConfig(images=4096, validation_images=64, outlier_channels=outliers)
    store = linear_gaussian_store(config)
    problem = Problem.load(store)
    condition, target = read(store, "train")
    residual = (target - problem.posterior_mean(condition)).flatten(0, 1)
    scale = problem.covariance_DD.diagonal().sqrt()
    count = len(residual)
    assert (residual.mean(0) / scale).abs().max() < 4 / count**0.5
    correlation = residual.T @ residual / count / scale / scale[:, None]
    expected = problem.covariance_DD / scale / scale[:, None]
    torch.testing.assert_close(correlation, expected, rtol=0, atol=6 / count**0.5)
    across = condition.flatten(0, 1).T @ (residual / scale) / count
    assert across.abs().max() < 5 / count**0.5
    explained = 1 - residual.var(0) / target.flatten(0, 1).var(0)
    torch.testing.assert_close(explained, torch.full_like(explained, 0.7), rtol=0, atol=0.01)


def test_rank_explained_share_and_outliers_are_those_asked_for():
    config = LinearGaussianConfig(rank=3, explained=0.4, outlier_channels=2)
    problem = draw(config)
    signal = problem.map_DC.square().sum(1)
    share = signal / (signal + problem.covariance_DD.diagonal())
    torch.testing.assert_close(share, torch.full_like(share, 0.4))
    assert torch.linalg.matrix_rank(problem.map_DC) == 3
    plain = draw(LinearGaussianConfig(rank=3, explained=0.4))
    ratio = (problem.covariance_DD.diagonal() / plain.covariance_DD.diagonal()).sqrt()
    assert ratio.tolist() == pytest.approx([30.0] * 2 + [1.0] * 6)


def exact_scores(problem, condition, target):
    """Score the exact posterior mean and an exact sample as an evaluation would."""
    sample = problem.posterior_sample(condition, torch.Generator().manual_seed(0))
    scores = []
    for tokens in (problem.posterior_mean(condition), sample):
        shape = TokenShape((4, 4), False, target.shape[2])
        metric = TokenScores(problem.mean_D.expand(shape.tokens, -1), shape)
        metric.update(tokens, target)
        scores.append(metric.compute())
    return scores


def test_the_mean_is_optimal_and_samples_cost_twice_its_error():
    store = linear_gaussian_store(LinearGaussianConfig(images=64, validation_images=4096))
    condition, target = read(store, "validation")
    problem = Problem.load(store)
    mean, sample = exact_scores(problem, condition, target)
    assert mean["mse"] == pytest.approx(problem.token_error(), rel=0.02)
    assert sample["mse"] == pytest.approx(2 * problem.token_error(), rel=0.02)
    assert mean["r2"] == pytest.approx(0.7, abs=0.02)
    assert sample["norm_ratio"] == pytest.approx(1.0, abs=0.01)
    assert mean["cosine"] > sample["cosine"] + 0.05
    for factor in (0.9, 1.1):  # nothing near the posterior mean does better
        other = factor * (problem.posterior_mean(condition) - target.mean((0, 1)))
        error = (other + target.mean((0, 1)) - target).square().mean()
        assert error > mean["mse"]


def test_the_cosine_of_samples_is_about_the_square_of_the_means_in_many_dimensions():
    config = LinearGaussianConfig(
        images=64, validation_images=256, condition_width=256, target_width=256, explained=0.6
    )
    store = linear_gaussian_store(config)
    mean, sample = exact_scores(Problem.load(store), *read(store, "validation"))
    assert sample["cosine_centred"] == pytest.approx(mean["cosine_centred"] ** 2, abs=0.02)


def test_posterior_samples_have_the_posterior_moments():
    problem = draw(LinearGaussianConfig())
    condition = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(0))
    draws = problem.posterior_sample(
        condition.expand(20000, 1, 16), torch.Generator().manual_seed(1)
    )[:, 0]
    scale = problem.covariance_DD.diagonal().sqrt()
    wrong_mean = (draws.mean(0) - problem.posterior_mean(condition)[0, 0]) / scale
    assert wrong_mean.abs().max() < 0.03
    wrong_covariance = (torch.cov(draws.T) - problem.covariance_DD) / scale / scale[:, None]
    assert wrong_covariance.abs().max() < 0.05


def test_a_store_is_built_once_and_equal_when_rebuilt(monkeypatch, tmp_path):
    store = linear_gaussian_store(SMALL)
    before = (store / "index.json").stat().st_mtime_ns
    assert linear_gaussian_store(SMALL) == store
    assert (store / "index.json").stat().st_mtime_ns == before
    other_seed = LinearGaussianConfig(images=1024, validation_images=256, seed=1)
    assert linear_gaussian_store(other_seed) != store
    assert not [path for path in store.parent.iterdir() if path.name.startswith(".")]
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path))
    again = linear_gaussian_store(SMALL)
    assert TokenStore.open(str(again)).index.hash == TokenStore.open(str(store)).index.hash
    for name, tensor in load_file(again / "problem.safetensors").items():
        assert torch.equal(tensor, load_file(store / "problem.safetensors")[name])


def test_impossible_problems_are_refused(tmp_path):
    with pytest.raises(UserError, match="data.linear_gaussian.rank=9"):
        linear_gaussian_store(LinearGaussianConfig(rank=9))
    with pytest.raises(UserError, match="outlier_channels=9"):
        linear_gaussian_store(LinearGaussianConfig(outlier_channels=9))
    with pytest.raises(UserError, match="problem.safetensors"):
        Problem.load(tmp_path)
