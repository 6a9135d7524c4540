"""One pass over the held-out images, in which every estimator runs on a batch before the next one.

So estimators of one translator share its encoded condition and first output (flow/memo.py).
Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.evaluation.estimators import Batch
from blip3o_lit.evaluation.held_out import HeldOut
from blip3o_lit.evaluation.probes import COVERAGE_IMAGES, Coverage, Draws
from blip3o_lit.evaluation.tally import Reference, Tally
from blip3o_lit.evaluation.verdict import REMEDY

Tallies = dict[str, Tally]
Watch = Callable[[dict[str, Tensor], Batch], None]


@dataclass
class Group:
    """Estimators that are scored on the same first images, beside the true tokens of those."""

    images: int
    reference: Reference
    tallies: Tallies = field(default_factory=dict)

    def add(self, batch: Batch) -> dict[str, Tensor]:
        """Score a batch; returns the tokens `[B, N, D]` of each, none behind the last image."""
        if not self.tallies or int(batch[2][0]) >= self.images:
            return {}
        _, true_BND, sample_B = batch
        self.reference.add(true_BND, sample_B)
        tokens = {name: tally.add(batch) for name, tally in self.tallies.items()}
        for name, tokens_BND in tokens.items():
            if not torch.isfinite(tokens_BND).all():
                raise UserError(f"{name} generates tokens that are not finite: {REMEDY}")
        return tokens


class MainPass:
    """What is counted: all images by the headline and the baselines, fewer by solvers.

    `watch` is given the tokens of the first two groups. Names of groups may repeat, as a point of
    the curve may be an estimator as well.
    """

    def __init__(
        self, shape: TokenShape, device: torch.device, images: int, solvers: int, curve: int
    ) -> None:
        self.every, self.solvers, self.curve = (
            Group(count, Reference(shape, device)) for count in (images, solvers, curve)
        )
        self.draws: Draws | None = None
        self.draw_images = 0
        self.coverage: Coverage | None = None

    def run(self, held_out: HeldOut, watch: Watch) -> None:
        images = self.every.images
        borders = [self.solvers.images, self.curve.images, self.draw_images]
        borders += [COVERAGE_IMAGES] if self.coverage else []
        for batch in held_out.batches(images, "scoring", borders):
            condition, _, sample_B = batch
            first = int(sample_B[0])
            if not first:  # The first call pays for caches and kernels: it is kept out of times.
                next(iter(self.every.tallies.values())).predict(condition[:1], sample_B[:1])
            tokens = self.every.add(batch) | self.solvers.add(batch)
            if self.coverage is not None and first < COVERAGE_IMAGES:
                self.coverage.add(tokens, condition)
            watch(tokens, batch)
            self.curve.add(batch)
            if self.draws is not None and first < self.draw_images:
                self.draws.add(batch)
