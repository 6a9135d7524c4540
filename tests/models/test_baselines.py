"""Baselines: closed forms, the data they may see, and what their state dict keeps."""

from __future__ import annotations

import pytest
import torch

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.baselines import MeanToken, Ridge, condition_at_targets
from blip3o_lit.models.regression import PatchMLP, Regression


def pair(source=(3, 2), target=(3, 2), source_cls=False, target_cls=False):
    return PairShape(TokenShape(source, source_cls, 6), TokenShape(target, target_cls, 4))


def linear_data(shape, images=64, noise=0.3, seed=0):
    """Targets that are linear in the condition at their position, with an offset a position."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(6, 4, generator=torch.Generator().manual_seed(99))
    offset = torch.randn(shape.target.tokens, 4, generator=torch.Generator().manual_seed(98))
    condition = 1 + torch.randn(images, shape.condition.tokens, 6, generator=generator)
    target = condition_at_targets(condition, shape) @ true + offset
    return condition, target + noise * torch.randn(target.shape, generator=generator)


def in_batches(condition, target, size=7):
    return lambda: zip(condition.split(size), target.split(size))


def test_mean_token_is_the_mean_of_each_position():
    condition, target = linear_data(pair())
    baseline = MeanToken(pair())
    baseline.fit(in_batches(condition, target))
    torch.testing.assert_close(baseline.predict(condition[:3]), target.mean(0).expand(3, -1, -1))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_ridge_solves_the_penalised_least_squares_problem_whatever_the_batches(size):
    condition, target = linear_data(pair())
    baseline = Ridge(pair())
    baseline.fit(in_batches(condition, target, size))
    x = (condition - condition.mean(0)).double().flatten(0, 1)
    y = (target - target.mean(0)).double().flatten(0, 1)
    shift = float(baseline.penalty) * (x.T @ x).diagonal().mean()
    rows = torch.cat((x, shift.sqrt() * torch.eye(6, dtype=torch.float64)))
    expected = torch.linalg.lstsq(rows, torch.cat((y, torch.zeros(6, 4)))).solution
    torch.testing.assert_close(baseline.weight[0].double(), expected, atol=1e-5, rtol=1e-5)
    residual = target - baseline.predict(condition)
    assert residual.mean(0).abs().max() < 1e-5


def test_ridge_takes_a_large_penalty_where_the_condition_says_nothing():
    generator = torch.Generator().manual_seed(1)
    condition = torch.randn(16, 6, 6, generator=generator)
    noise = torch.randn(16, 6, 4, generator=generator)
    useless, useful = Ridge(pair()), Ridge(pair())
    useless.fit(in_batches(condition, noise))
    useful.fit(in_batches(condition, condition[..., :4]))
    assert float(useless.penalty) >= 1
    assert float(useful.penalty) == pytest.approx(1e-6)


def test_ridge_fits_cls_apart_from_patches():
    shape = pair(source_cls=True, target_cls=True)
    condition, target = linear_data(shape, images=200, noise=0.0)
    target[:, 0] = -3 * condition[:, 0, :4]
    baseline = Ridge(shape)
    baseline.fit(in_batches(condition, target))
    torch.testing.assert_close(baseline.predict(condition), target, atol=1e-3, rtol=1e-3)


def test_ridge_refuses_a_single_image():
    condition, target = linear_data(pair(), images=1)
    with pytest.raises(UserError, match="needs 2 training images"):
        Ridge(pair()).fit(in_batches(condition, target))


def test_condition_follows_the_target_grid():
    shape = pair(source=(4, 4), target=(2, 2), source_cls=True)
    condition = torch.randn(2, 17, 6)
    condition[:, 1:] = 5.0
    torch.testing.assert_close(condition_at_targets(condition, shape), torch.full((2, 4, 6), 5.0))
    shape = pair(target_cls=True)
    condition = torch.randn(2, 6, 6)
    aligned = condition_at_targets(condition, shape)
    torch.testing.assert_close(aligned[:, 0], condition.mean(1))
    torch.testing.assert_close(aligned[:, 1:], condition)


TINY = ModelConfig(width=32, depth=2, heads=4, kv_heads=2, mlp_width=64)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (lambda s: PatchMLP(s, hidden=32), {}),
        (lambda s: Regression(TINY, s), {"config": OptimizerConfig(lr=1e-2)}),
        (lambda s: Regression(TINY, s), {"config": OptimizerConfig("muon", lr=1e-2)}),
    ],
    ids=["mlp", "dit", "dit-muon"],
)
def test_trained_baselines_learn_and_come_back_from_their_state_dict(build, options, bf16):
    torch.manual_seed(0)
    shape = pair()
    condition, target = linear_data(shape, images=64, noise=0.0)
    held_condition, held_target = linear_data(shape, images=64, noise=0.0, seed=5)
    baseline, losses = build(shape), []
    batches = in_batches(condition, target, 16)
    baseline.fit(
        batches, steps=400, bf16=bf16, progress=lambda s, x: losses.append((s, x)), **options
    )
    assert [step for step, _ in losses] == list(range(1, 401))
    held = (baseline.predict(held_condition) - held_target).square().mean()
    assert held < 0.25 * held_target.var()
    again = build(shape)
    again.load_state_dict(baseline.state_dict())
    assert torch.equal(again.eval().predict(held_condition), baseline.predict(held_condition))
    assert baseline.predict(condition).dtype == torch.float32


def test_the_cosine_term_is_that_of_restored_tokens():
    condition, target = linear_data(pair(), images=8)
    first: dict[float, float] = {}
    for weight in (0.0, 2.0):
        torch.manual_seed(0)
        baseline = Regression(TINY, pair())
        guess = baseline.predict(condition)
        baseline.fit(
            in_batches(condition, target, 8),
            steps=1,
            bf16=False,
            progress=lambda step, loss, weight=weight: first.update({weight: float(loss)}),
            cosine_weight=weight,
            restore=lambda x: 3 * x + 1,
        )
    cosine = torch.cosine_similarity(3 * guess + 1, 3 * target + 1, dim=-1).mean()
    assert first[2.0] - first[0.0] == pytest.approx(2 * (1 - float(cosine)), rel=1e-4)


def test_a_training_split_without_batches_is_refused():
    with pytest.raises(UserError, match="no batch"):
        PatchMLP(pair()).fit(lambda: [], steps=1)
