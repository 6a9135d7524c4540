"""A trained translator: network, flow and token scales together, from raw tokens to raw tokens.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from blip3o_lit.base.condition import AnyCondition
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow import draws
from blip3o_lit.flow.draws import Stream
from blip3o_lit.flow.loss_record import LossRecord
from blip3o_lit.flow.memo import Memo
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.scheme import FittedSolvers
from blip3o_lit.flow.solvers import Sample, sample
from blip3o_lit.tokens.scales import standardised
from blip3o_lit.tokens.statistics import Standardizer
from blip3o_lit.translation.cuda_graphs import Graphs


class Translator(nn.Module):
    """Generates target tokens from condition tokens, both in the towers' own scale.

    The scales are those of the condition's grid, of the target and of words: None for what the
    condition doesn't have.
    `autocast` is the format of the network's matrix products; None leaves it to the caller. The
    state of an ODE solver is fp32 either way. With `graphs` solvers run as CUDA graphs; with `memo`
    those that are given one and the same condition in turn share what they can.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: FlowObjective,
        condition_standardizer: Standardizer | None,
        target_standardizer: Standardizer,
        autocast: torch.dtype | None = None,
        words_standardizer: Standardizer | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.network = network
        self.objective = objective
        self.condition_standardizer = condition_standardizer
        self.target_standardizer = target_standardizer
        self.words_standardizer = words_standardizer
        self.fitted = FittedSolvers()
        self.graphs: Graphs | None = None
        self.memo: Memo | None = None

    def standardised(self, condition: AnyCondition) -> AnyCondition:
        """Return a raw condition as the network reads it."""
        return standardised(condition, self.condition_standardizer, self.words_standardizer)

    @torch.no_grad()
    def generate(
        self,
        condition: AnyCondition,
        sample_B: Tensor,
        seed: int,
        solver: SolverConfig,
        noise_BND: Tensor | None = None,
        intermediates: bool = False,
    ) -> Sample:
        """Generate target tokens.

        Args:
            condition: Raw condition tokens [B, M, C], or words.
            sample_B: Sample ids; with `seed` they determine the noise, whatever the batch.
            seed: Seed of the noise.
            solver: The estimator: `mean`, or an ODE solver; `fitted` is looked up in `fitted`.
            noise_BND: Standard normal noise in place of the reproducible draw.
            intermediates: Keep the state after each step.

        Returns:
            Raw target tokens `x1_BND` (fp32), the number of network evaluations, and the states.
        """
        repeatable = noise_BND is None and not intermediates
        graphs = None if intermediates else self.graphs
        memo = self.memo if repeatable and graphs is None else None

        def compute() -> Sample:
            scheme = self.fitted.scheme(solver) if solver.name == "fitted" else None
            standard = self.standardised(condition)
            noise = noise_BND
            if noise is None:
                noise = self._noise(sample_B, seed, condition.device)
            inputs = (self.objective, self.network, standard, noise, solver)
            with self.precision(condition.device.type):
                if graphs is None:
                    result = sample(*inputs, intermediates, scheme, memo, seed)
                else:
                    result = graphs.sample(*inputs, scheme)
            restore = self.target_standardizer.restore
            return replace(
                result,
                x1_BND=restore(result.x1_BND),
                intermediates=[restore(x_BND) for x_BND in result.intermediates],
            )

        if memo is None:
            return compute()
        memo.at(condition)
        return memo.once((repr(solver), seed), compute)

    @torch.no_grad()
    def losses_at(
        self,
        times: Iterable[float],
        condition: AnyCondition,
        target_BND: Tensor,
        sample_B: Tensor,
        seed: int,
    ) -> Iterator[LossRecord]:
        """Yield the loss of raw tokens at each time, with the noise that `generate` would draw."""
        encoded: Any = self.standardised(condition)
        x1_BND = self.target_standardizer.standardise(target_BND)
        z_BND = self._noise(sample_B, seed, x1_BND.device)
        encode = getattr(self.network, "encode", None)
        with self.precision(x1_BND.device.type):
            encoded = encoded if encode is None else encode(encoded)
        for time in times:
            t_B = torch.full((len(x1_BND),), time, device=x1_BND.device)
            with self.precision(x1_BND.device.type):
                record = self.objective.loss(self.network, encoded, x1_BND, z_BND, t_B)
            yield record

    def _noise(self, sample_B: Tensor, seed: int, device: torch.device) -> Tensor:
        shape, epoch_B = tuple(self.target_standardizer.mean_NC.shape), torch.zeros_like(sample_B)
        return draws.noise(seed, Stream.EVALUATION_NOISE, sample_B, epoch_B, shape, device)

    def precision(self, device: str) -> AbstractContextManager[object]:
        """Return the autocast context of the network."""
        return torch.autocast(device, self.autocast) if self.autocast else nullcontext()
