"""What one cosine does not tell: swapped conditions, the loss by time, how samples differ.

Shape suffixes: K samples, B images, N target tokens, D target width.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.evaluation.estimators import Batch, Estimator
from blip3o_lit.metrics.calibration import Calibration
from blip3o_lit.metrics.cosine import cosine
from blip3o_lit.testbeds.ambiguous import coverage
from blip3o_lit.translation.translator import Translator

BINS = 8
COVERAGE_IMAGES = 1024
"""Images that mode coverage is counted on, at most."""
_EDGE = 1e-3
"""Times stay this far from both ends, where not every output has a value."""


def swapped(estimators: dict[str, Estimator], batches: Iterable[Batch]) -> dict[str, Any]:
    """Score tokens that were generated from the condition of the next image in the batch.

    A translator that follows its condition then scores what two different true images score
    (`random_pairs`); one that ignores it scores as before. A posterior mean may lie a little above:
    it is smoother than a true image. A batch of a single image is left out.
    """
    sums = dict.fromkeys(["random_pairs", *estimators], 0.0)
    images = 0
    for condition, true_BND, sample_B in batches:
        if len(sample_B) < 2:
            continue
        other = condition[torch.roll(torch.arange(len(sample_B), device=condition.device), -1)]
        tokens = {name: estimate(other, sample_B)[0] for name, estimate in estimators.items()}
        tokens["random_pairs"] = torch.roll(true_BND, -1, 0)
        for name, tokens_BND in tokens.items():
            sums[name] += float(cosine(tokens_BND.double(), true_BND.double()).mean(1).sum())
        images += len(sample_B)
    return {"images": images, **{name: total / images for name, total in sums.items()}}


def time_bins(translator: Translator, batches: Iterable[Batch], seed: int) -> list[dict[str, Any]]:
    """Return the squared error of the network's output in equal bins of t, from noise to data.

    Each image is put at the middle of every bin with its own noise, so bins differ in nothing but
    the time. The error is in the units of the unscaled output, as `val_loss` is. Beside it: cosine
    of implied and true velocity of a whole image, and the mean length of the output over that of
    its target.
    """
    edges = np.linspace(0, 1, BINS + 1).tolist()
    bins = list(zip(edges[:-1], edges[1:]))
    times = [min(max((low + high) / 2, _EDGE), 1 - _EDGE) for low, high in bins]
    sums = np.zeros((BINS, 3))
    images = 0
    for condition, true_BND, sample_B in batches:
        losses = translator.losses_at(times, condition, true_BND, sample_B, seed)
        for number, terms in enumerate(losses):
            means = terms.mse_B.mean(), terms.velocity_cosine, terms.norm_ratio
            sums[number] += len(sample_B) * np.array([float(mean) for mean in means])
        images += len(sample_B)
    return [
        {"t": [low, high], "loss": loss, "velocity_cosine": velocity, "norm_ratio": ratio}
        for (low, high), (loss, velocity, ratio) in zip(bins, (sums / images).tolist())
    ]


class Draws:
    """Diversity and calibration of several samples per condition, by as many estimators.

    `watch` is given the samples `[K, B, N, D]` of each batch.
    """

    def __init__(
        self,
        draw: list[Estimator],
        mean: Estimator,
        device: torch.device,
        watch: Callable[[Tensor], None] = lambda _: None,
    ) -> None:
        self.draw, self.mean, self.watch = draw, mean, watch
        self.metric = Calibration(len(draw)).to(device)

    def add(self, batch: Batch) -> None:
        condition, true_BND, sample_B = batch
        samples_KBND = torch.stack([draw(condition, sample_B)[0] for draw in self.draw])
        self.watch(samples_KBND)
        self.metric.update(samples_KBND, self.mean(condition, sample_B)[0], true_BND)

    def result(self) -> dict[str, Any]:
        return self.metric.compute()


class Coverage:
    """Which modes of the store's known law each estimator draws."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, tokens: Mapping[str, Tensor], condition_BMC: Tensor) -> None:
        for name, tokens_BND in tokens.items():
            self._parts.setdefault(name, []).append((condition_BMC.cpu(), tokens_BND.cpu()))

    def result(self) -> dict[str, Any]:
        shares = {}
        for name, parts in self._parts.items():
            condition, tokens = (torch.cat(side) for side in zip(*parts))
            shares[name] = coverage(self.store, condition, tokens)
        return shares
