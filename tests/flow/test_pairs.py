"""Maps of two times: closed forms, what pairs train, that the mean and the flow stay."""

import itertools

import pytest
import torch
from torch import nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import PATHS, FlowConfig
from blip3o_lit.config.solver import SolverConfig, check_solver
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.pairs import LEVELS, SHORTEST, Pairs, half_steps, pair_times
from blip3o_lit.flow.path import over, path_named
from blip3o_lit.flow.solvers import sample
from blip3o_lit.flow.times import training_times

VARIANCES = torch.logspace(-2, 0, 9, dtype=torch.float64)


def exact_output(path):
    """The output of the exact map where x1 is N(0, variance), one variance a channel."""

    def output(x_BND, t_B, s_B):
        t, s = over(t_B, x_BND), over(s_B, x_BND)

        def deviation(time):
            return (path.alpha(time) ** 2 * VARIANCES + path.sigma(time) ** 2).sqrt()

        shrink = path.sigma(s) / path.sigma(t)
        end_BND = x_BND * deviation(s) / deviation(t)
        return (end_BND - shrink * x_BND) / (path.alpha(s) - path.alpha(t) * shrink)

    return output


def pairs_config(**options):
    return FlowConfig(**{"pairs": 0.5, "cosine_weight": 0.0, **options})


@pytest.mark.parametrize("name", PATHS)
def test_two_exact_half_maps_are_one_map(name):
    path = path_named(name)
    generator = torch.Generator().manual_seed(0)
    x_BND = torch.randn(4, 3, 9, generator=generator, dtype=torch.float64)
    t_B = torch.tensor([0.0, 0.0, 0.3, 0.9], dtype=torch.float64)
    s_B = torch.tensor([1.0, 0.2, 0.35, 1.0], dtype=torch.float64)
    output = exact_output(path)
    target_BND = half_steps(output, path, x_BND, t_B, s_B)
    torch.testing.assert_close(target_BND, output(x_BND, t_B, s_B))


def test_the_shortest_ways_are_midpoint_steps_of_the_flow():
    path = path_named("linear")
    x_BND = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    t_B = torch.tensor([0.5, 0.5])
    s_B = t_B + torch.tensor([SHORTEST, 2 * SHORTEST])
    ends = []

    def output(x_BND, t_B, s_B):
        ends.append((s_B - t_B).tolist())
        return 2 * x_BND + over(t_B, x_BND)

    target_BND = half_steps(output, path, x_BND, t_B, s_B)
    assert ends == [[0, SHORTEST]] * 2
    half = SHORTEST / 2
    middle_ND = x_BND[0] + half * (2 * x_BND[0] + 0.5 - x_BND[0]) / 0.5
    torch.testing.assert_close(target_BND[0], 2 * middle_ND + 0.5 + half)


def test_the_exact_map_draws_in_one_step_what_it_draws_in_four():
    objective = FlowObjective(pairs_config())
    exact = exact_output(objective.path)

    def network(x_BND, t_B, condition, s_B):
        return exact(x_BND.double(), t_B.double(), s_B.double())

    noise_BND = torch.randn(5, 2, 9, generator=torch.Generator().manual_seed(0))
    for steps in (1, 4):
        made = sample(objective, network, None, noise_BND, SolverConfig(name="map", steps=steps))
        assert made.nfe == steps
        expected_BND = noise_BND * VARIANCES.sqrt()
        torch.testing.assert_close(made.x1_BND.double(), expected_BND, rtol=1e-4, atol=1e-5)


def test_pairs_take_their_share_and_leave_the_others_alone():
    config = pairs_config(pairs=0.25, time_zero_share=0.5)
    uniforms_BU = torch.rand(40_000, 5, generator=torch.Generator().manual_seed(0))
    before_B = training_times(uniforms_BU[:, :2], config)
    t_B, pairs = pair_times(uniforms_BU[:, 2:], before_B, config)
    starts_P, rows_P = t_B[pairs.rows_P], pairs.rows_P
    assert len(rows_P) / len(t_B) == pytest.approx(0.25, abs=0.01)
    length_P = pairs.s_P - starts_P
    for level in range(LEVELS):
        way_P = length_P == 0.5**level
        assert float(way_P.double().mean()) == pytest.approx(1 / LEVELS, abs=0.02)
        assert starts_P[way_P].unique().tolist() == [k * 0.5**level for k in range(2**level)]
    others_B = torch.ones(len(t_B), dtype=torch.bool).index_fill(0, rows_P, False)
    assert torch.equal(t_B[others_B], before_B[others_B])
    assert float((t_B[others_B] == 0).double().mean()) == pytest.approx(0.5, abs=0.01)


def test_the_loss_of_a_pair_is_the_distance_to_two_half_steps_and_of_others_to_the_data():
    objective = FlowObjective(pairs_config())
    generator = torch.Generator().manual_seed(0)
    x1, z = (torch.randn(3, 2, 4, generator=generator) for _ in range(2))
    t_B, pairs = torch.tensor([0.2, 0.0, 0.0]), Pairs(torch.tensor([1]), torch.tensor([0.5]))
    weight = torch.ones((), requires_grad=True)
    calls = []

    def network(x_BND, t_B, condition, s_B):
        calls.append((x_BND, t_B, s_B, torch.is_grad_enabled()))
        return weight * (x_BND + condition + over(2 * s_B + t_B, x_BND))

    condition = torch.ones(3, 2, 4)
    loss = objective.loss(network, condition, x1, z, t_B, pairs=pairs)
    assert [grad for *_, grad in calls] == [False, False, True]
    seen_x, _, seen_s, _ = calls[2]
    assert torch.equal(seen_s, torch.tensor([0.2, 0.5, 0.0]))
    assert torch.equal(seen_x[1], z[1])  # a map from t = 0 sees the noise,
    assert torch.equal(seen_x[2], torch.zeros(2, 4))  # the mean does not
    first = z[1] + 1 + 2 * 0.25
    middle = z[1] + 0.25 * (first - z[1])
    second = middle + 1 + 2 * 0.5 + 0.25
    # x + (X1 - x)/2 + (1 - t)/(1 - m) (X2 - x_m)/2 is where the target lies.
    target = z[1] + (first - z[1]) / 2 + (second - middle) / (2 * 0.75)
    own = (z[1] + 1 + 2 * 0.5 - target).square().mean()
    torch.testing.assert_close(loss.mse_B[1], own.detach())
    torch.testing.assert_close(loss.mse_B[2], (1 - x1[2]).square().mean())
    loss.total.backward()
    # Nothing flows through the target: with a weight of one the gradient is that of the outputs.
    out = seen_x + 1 + over(2 * seen_s + t_B, x1)
    goal = torch.stack([x1[0], target, x1[2]])
    torch.testing.assert_close(weight.grad, (2 * (out - goal) * out).mean())


class Small(nn.Module):
    """A network of one number a token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(3, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 1)
        )

    def forward(self, x_BND, t_B, condition, s_B=None):
        s_B = t_B if s_B is None else s_B
        times = [over(time, x_BND).expand(-1, x_BND.shape[1], 1) for time in (t_B, s_B)]
        return self.layers(torch.cat([x_BND, *times], -1))


def test_one_trained_evaluation_finds_both_answers_and_the_mean_stays_between():
    """Two answers, 1 and -1, of weights 0.7 and 0.3: the flow's one step lies between them."""
    config, network = pairs_config(time_zero_share=0.25), Small()
    objective = FlowObjective(config)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    steps, generator = 400, torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        uniforms_BU = torch.rand(128, 5, generator=generator)
        x1_BND = torch.where(torch.rand(128, 1, 1, generator=generator) < 0.7, 1.0, -1.0)
        x1_BND = x1_BND + 0.1 * torch.randn(128, 1, 1, generator=generator)
        z_BND = torch.randn(128, 1, 1, generator=generator)
        times = pair_times(uniforms_BU[:, 2:], training_times(uniforms_BU[:, :2], config), config)
        optimizer.zero_grad()
        condition = torch.zeros(128, 1, 1)
        loss = objective.loss(network, condition, x1_BND, z_BND, times[0], pairs=times[1])
        loss.total.backward()
        optimizer.step()
        schedule.step()
    condition, noise_BND = torch.zeros(4096, 1, 1), torch.randn(4096, 1, 1, generator=generator)

    def made(name, steps=1):
        solver = SolverConfig(name=name, steps=steps)
        return sample(objective, network, condition, noise_BND, solver).x1_BND.flatten()

    def close(x):
        return float(((x.abs() - 1).abs() < 0.3).double().mean())

    drawn, flow, between = made("map"), made("heun", 20), made("mean")
    shares = [float((x > 0).double().mean()) for x in (drawn, flow)]
    assert shares[0] == pytest.approx(shares[1], abs=0.1)
    assert 0.6 < shares[0] < 0.9
    assert close(drawn) > 0.5
    assert close(made("euler")) == 0
    assert float(between.mean()) == pytest.approx(0.4, abs=0.05)
    assert float(between.std()) < 1e-5


def test_maps_are_refused_where_none_was_trained():
    with pytest.raises(UserError, match="solver=map needs a network .* flow.pairs above 0"):
        check_solver(FlowConfig(), SolverConfig.named("map"))
    for wrong in ({"steps": 3}, {"start": 0.1}, {"grid": "cosine"}):
        with pytest.raises(UserError, match="solver=map takes 1, 2, 4, ... 64 uniform steps"):
            SolverConfig(**{"name": "map", "steps": 1, **wrong})
    for output in ("velocity", "noise"):
        with pytest.raises(UserError, match="flow.pairs=0.5 trains maps of flow.prediction=sample"):
            pairs_config(prediction=output, time_zero_share=0.0)


def test_a_second_time_of_zero_weight_changes_nothing_at_the_start():
    from blip3o_lit.base.shape import PairShape, TokenShape
    from blip3o_lit.config.model import ModelConfig
    from blip3o_lit.models.network_of import build_network

    shape = PairShape(TokenShape((2, 2), False, 6), TokenShape((2, 2), False, 4))
    x_BND, c_BMC = torch.randn(2, 4, 4), torch.randn(2, 4, 6)
    t_B, s_B = torch.tensor([0.0, 0.3]), torch.tensor([1.0, 0.4])
    for architecture, conditioning in itertools.product(("dit", "nextdit"), ("aligned", "cross")):
        if (architecture, conditioning) == ("nextdit", "aligned"):
            continue
        config = ModelConfig(
            architecture, 16, 2, 2, 1, 16, conditioning=conditioning, second_time=True
        )
        network = build_network(config, shape)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if not name.startswith("span."):
                    parameter.add_(0.1 * torch.randn_like(parameter))
            plain = network(x_BND, t_B, c_BMC)
            assert torch.equal(network(x_BND, t_B, c_BMC, s_B), plain)
            network.span.second.weight.add_(0.1)
            assert not torch.equal(network(x_BND, t_B, c_BMC, s_B), plain)
