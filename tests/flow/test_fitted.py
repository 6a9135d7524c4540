"""Fitted solvers on laws whose exact velocity is known: few evaluations draw as many do."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from blip3o_lit.config.data import AmbiguousConfig, LinearGaussianConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.flow import PATHS, FlowConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow.fitted import SolverFit, scheme_of
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.scheme import FittedSolvers
from blip3o_lit.flow.solvers import sample
from blip3o_lit.metrics.frechet import Moments, frechet_distance
from blip3o_lit.testbeds import ambiguous, linear_gaussian

TOKENS = 16


class Exact:
    """The exact x1_hat of a law, for one batch of conditions, in units of each channel's std."""

    def __init__(self, problem, images, seed):
        self.random = torch.Generator().manual_seed(seed)
        self.problem, self.path = problem, FlowObjective(FlowConfig()).path
        width = len(problem.mean_D)
        between_D = problem.weights_K @ problem.modes_KD.square()
        variance_D = problem.map_DC.square().sum(1) + problem.covariance_DD.diagonal() + between_D
        self.scale_D = variance_D.sqrt()
        self.covariance_DD = problem.covariance_DD / self.scale_D / self.scale_D[:, None]
        self.modes_KD = problem.modes_KD / self.scale_D
        channels = problem.map_DC.shape[1]
        self.condition = self.normal(images, TOKENS, channels)
        mean_BND = problem.posterior_mean(self.condition) - problem.mean_D
        self.mean_BND = mean_BND / self.scale_D
        self.noise_BND = self.normal(images, TOKENS, width)

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.random, dtype=torch.float64)

    def true(self):
        drawn = self.problem.posterior_sample(self.condition, self.random)
        return (drawn - self.problem.mean_D) / self.scale_D

    def estimate(self, x_BND, t):
        marginal_DD = t**2 * self.covariance_DD + (1 - t) ** 2 * torch.eye(len(self.scale_D))
        inverse_DD = torch.linalg.inv(marginal_DD)
        centres_BNKD = self.mean_BND.unsqueeze(2) + self.modes_KD
        rest_BNKD = x_BND.double().unsqueeze(2) - t * centres_BNKD
        whitened_BNKD = rest_BNKD @ inverse_DD
        energy_BK = (rest_BNKD * whitened_BNKD).sum((1, 3)) / 2
        share_BK = torch.softmax(self.problem.weights_K.log() - energy_BK, -1)
        each_BNKD = centres_BNKD + t * whitened_BNKD @ self.covariance_DD
        return (share_BK[:, None, :, None] * each_BNKD).sum(2).float()

    def part(self, start, end):
        """The estimate of some of the conditions."""
        own = object.__new__(Exact)
        own.__dict__.update(self.__dict__, mean_BND=self.mean_BND[start:end])
        return own.estimate


def fit(problem, evaluations, images=128):
    law = Exact(problem, images, seed=0)
    half = images // 2
    fits = SolverFit(
        FlowObjective(FlowConfig()), law.part(0, half), law.part(half, images), law.noise_BND
    )
    return fits.fit(evaluations)


def distance(a_BND, b_BND):
    moments = [Moments(a_BND.shape[-1]) for _ in range(2)]
    for one, tokens in zip(moments, (a_BND, b_BND)):
        one.update(tokens.flatten(0, 1))
    return frechet_distance(*(one.compute() for one in moments))


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "rk4", "ab2"])
@pytest.mark.parametrize("path", PATHS)
def test_each_usual_solver_is_a_scheme(path, name):
    objective = FlowObjective(FlowConfig(path=path))

    def network(x_BND, t_B, condition):
        return torch.tanh(x_BND + t_B[0])

    noise_BND = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    solver = SolverConfig(name=name, steps=3, grid="shift", shift=2.0)
    scheme = scheme_of(objective, solver)
    made = sample(objective, network, None, noise_BND, solver)
    if scheme is None:  # its last stage takes a velocity where no noise is left
        assert path.startswith("seed") or name in ("heun", "rk4")
        return
    fitted = SolverConfig(name="fitted", nfe=made.nfe)
    other = sample(objective, network, None, noise_BND, fitted, scheme=scheme)
    assert other.nfe == made.nfe == len(scheme.times_K)
    torch.testing.assert_close(other.x1_BND, made.x1_BND, rtol=1e-4, atol=1e-4)


def test_four_evaluations_draw_from_a_gaussian_law_as_its_exact_sampler_does():
    problem = linear_gaussian.draw(LinearGaussianConfig())
    scheme, record = fit(problem, 4)
    law = Exact(problem, 2048, seed=1)
    drawn = scheme.states(law.estimate, law.noise_BND)[-1]
    true, exact = law.true(), law.true()
    variance_D = (drawn - law.mean_BND).var((0, 1)) / law.covariance_DD.diagonal()
    assert float(variance_D.mean()) == pytest.approx(1, abs=0.01)
    cosines = [float(cosine_similarity(x, true, dim=-1).mean()) for x in (drawn, exact)]
    assert cosines[0] == pytest.approx(cosines[1], rel=0.01)
    assert record["distance"] < min(record["fixed"].values()) / 4


def test_four_evaluations_choose_among_answers_as_well_as_two_true_halves_agree():
    problem = ambiguous.draw(AmbiguousConfig())
    scheme, record = fit(problem, 4)
    law = Exact(problem, 384, seed=1)
    drawn = scheme.states(law.estimate, law.noise_BND)[-1]
    true = law.true()
    floor = distance(true[::2], true[1::2])
    assert distance(drawn, true) <= 1.5 * floor
    nearest_B = torch.cdist((drawn - law.mean_BND).mean(1), law.modes_KD).argmin(1)
    shares_K = torch.bincount(nearest_B, minlength=3) / len(nearest_B)
    # Within 0.05, and what 384 draws of a share vary by.
    assert (shares_K - problem.weights_K).abs().max() < 0.05 + 0.025
    assert record["distance"] <= min(record["fixed"].values())


@pytest.mark.parametrize("evaluations", [1, 2, 3, 8])
def test_no_usual_solver_of_as_many_evaluations_is_nearer(evaluations):
    scheme, record = fit(linear_gaussian.draw(LinearGaussianConfig()), evaluations, images=16)
    assert scheme.times_K.shape == (evaluations,)
    assert scheme.weights_KS.shape == (evaluations, evaluations + 1)
    assert record["fixed"]
    assert record["distance"] <= min(record["fixed"].values())
    assert record["times"] == sorted(record["times"])


def test_a_fit_is_the_same_twice():
    problem = linear_gaussian.draw(LinearGaussianConfig())
    (one, _), (two, _) = fit(problem, 3, 16), fit(problem, 3, 16)
    assert torch.equal(one.weights_KS, two.weights_KS)
    assert torch.equal(one.times_K, two.times_K)


def test_impossible_wishes_are_refused():
    with pytest.raises(UserError, match="solver.nfe=41 is above 40"):
        SolverConfig(name="fitted", nfe=41)
    with pytest.raises(UserError, match="solver=fitted has its own times"):
        SolverConfig(name="fitted", start=0.1)
    with pytest.raises(UserError, match="without guidance"):
        FittedSolvers().scheme(SolverConfig(name="fitted", guidance_scale=2.0))
