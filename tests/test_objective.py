"""The objective: targets and loss against formulas, scales undone, logged figures."""

import pytest
import torch
import torch.nn.functional as F

from blip3o_lit.config.flow import PATHS, PREDICTIONS, FlowConfig
from blip3o_lit.flow.objective import FlowObjective


def config(**options):
    return FlowConfig(**{"time_zero_share": 0.0, **options})


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x1, z, guess = (torch.randn(4, 5, 6, generator=generator) for _ in range(3))
    return x1, z, guess, torch.tensor([0.1, 0.3, 0.6, 0.9])


def constant(out):
    """A network that puts out a given tensor."""
    return lambda x, t, condition: out


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS)
def test_loss_is_the_mean_squared_error_to_the_chosen_output(batch, path, prediction):
    x1, z, guess, t = batch
    objective = FlowObjective(config(path=path, prediction=prediction))
    seen = {}

    def network(x, times, condition):
        seen.update(x=x, t=times, condition=condition)
        return guess

    terms = objective.loss(network, "condition", x1, z, t)
    target = {"sample": x1, "noise": z, "velocity": objective.path.velocity(x1, z, t)}[prediction]
    torch.testing.assert_close(terms.total, F.mse_loss(guess, target))
    torch.testing.assert_close(terms.mse_B, (guess - target).square().mean((1, 2)))
    assert torch.equal(terms.mse, terms.total)
    assert torch.equal(seen["x"], objective.path.interpolate(x1, z, t))
    assert torch.equal(seen["t"], t)
    assert seen["condition"] == "condition"


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_output_has_no_loss_and_gives_back_x1(batch, prediction):
    x1, z, _, t = batch
    objective = FlowObjective(config(prediction=prediction, cosine_weight=1.0))
    out = objective.path.output(prediction, x1, z, t)
    terms = objective.loss(constant(out), None, x1, z, t)
    assert terms.total < 1e-6
    torch.testing.assert_close(terms.x1_hat_BND, x1, rtol=0, atol=1e-4)
    torch.testing.assert_close(terms.norm_ratio, torch.tensor(1.0))
    torch.testing.assert_close(terms.velocity_cosine, torch.tensor(1.0))


def test_velocity_scale_multiplies_the_target_and_output_scale_the_output(batch):
    x1, z, guess, t = batch
    scaled = config(prediction="velocity", velocity_scale=0.1, output_scale=3.0)
    objective = FlowObjective(scaled)
    target = objective.path.velocity(x1, z, t)
    terms = objective.loss(constant(guess), None, x1, z, t)
    torch.testing.assert_close(terms.total, F.mse_loss(3.0 * guess, 0.1 * target))
    torch.testing.assert_close(terms.mse, F.mse_loss(3.0 * guess / 0.1, target))
    read = objective.velocity(constant(0.1 / 3.0 * target), None, x1, t)
    torch.testing.assert_close(read, target)


def test_the_cosine_term_is_taken_on_restored_tokens(batch):
    x1, z, guess, t = batch
    scale, shift = torch.linspace(0.1, 5, 6), torch.ones(6)

    def restore(x):
        return x * scale + shift

    plain = FlowObjective(config()).loss(constant(guess), None, x1, z, t)
    objective = FlowObjective(config(cosine_weight=0.5))
    terms = objective.loss(constant(guess), None, x1, z, t, restore)
    expected = 1 - F.cosine_similarity(restore(guess), restore(x1), dim=-1).mean()
    torch.testing.assert_close(terms.cosine_loss, expected)
    torch.testing.assert_close(terms.total, plain.total + 0.5 * expected)
    assert plain.cosine_loss is None


def test_the_gradient_reaches_the_network_and_logged_terms_hold_none(batch):
    x1, z, guess, t = batch
    guess.requires_grad_()
    terms = FlowObjective(config(cosine_weight=1.0)).loss(constant(guess), None, x1, z, t)
    terms.total.backward()
    assert guess.grad is not None
    assert guess.grad.abs().sum() > 0
    logged = (terms.mse, terms.mse_B, terms.x1_hat_BND, terms.norm_ratio, terms.velocity_cosine)
    assert not any(value.requires_grad for value in (*logged, terms.cosine_loss))


def test_a_half_precision_network_is_read_in_float32(batch):
    x1, z, guess, t = batch
    objective = FlowObjective(config())
    terms = objective.loss(constant(guess.bfloat16()), None, x1, z, t)
    assert terms.total.dtype == torch.float32
    torch.testing.assert_close(terms.total, F.mse_loss(guess.bfloat16().float(), x1))


def test_norm_ratio_and_velocity_cosine(batch):
    x1, z, guess, t = batch
    objective = FlowObjective(config(prediction="velocity"))
    target = objective.path.velocity(x1, z, t)
    terms = objective.loss(constant(-2 * target), None, x1, z, t)
    torch.testing.assert_close(terms.norm_ratio, torch.tensor(2.0))
    torch.testing.assert_close(terms.velocity_cosine, torch.tensor(-1.0))
    terms = objective.loss(constant(guess), None, x1, z, t)
    expected = F.cosine_similarity(guess.flatten(1), target.flatten(1)).mean()
    torch.testing.assert_close(terms.velocity_cosine, expected)


@pytest.mark.parametrize("prediction", ["sample", "velocity"])
def test_a_trained_mean_is_the_conditional_mean(prediction):
    """Closed form: at t = 0 the best affine network of the loss gives E[x1|c]."""
    generator = torch.Generator().manual_seed(0)
    count = 20000
    condition = torch.randn(count, 1, 2, generator=generator)
    weight = torch.tensor([[1.0, -0.5], [0.3, 0.8]])
    x1 = condition @ weight + 0.5 * torch.randn(count, 1, 2, generator=generator)
    z = torch.randn(count, 1, 2, generator=generator)
    objective = FlowObjective(FlowConfig(prediction=prediction))
    maps = torch.zeros(4, 2, requires_grad=True)

    def network(x, t, given):
        return torch.cat([x, given], -1) @ maps

    optimizer = torch.optim.LBFGS([maps], max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = objective.loss(network, condition, x1, z, torch.zeros(count)).total
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        probe = torch.eye(2).unsqueeze(1)
        mean = objective.estimate(network, probe, torch.zeros(2, 1, 2), torch.zeros(2))
    torch.testing.assert_close(mean[:, 0], weight, rtol=0, atol=0.02)
