"""Whether K samples of one condition spread as the truth does around what is known.

If samples and truth are drawn from the same posterior, independently, then
  MSE(sample) = 2 MSE(posterior mean),
  MSE(mean of K) = (1 + 1/K) MSE(posterior mean),
  the truth lies between the smallest and largest of K samples in (K - 1) / (K + 1) of all values,
  and spread / skill, sqrt((1 + 1/K) variance among samples / MSE(mean of K)), is 1.
Shape suffixes: K samples, B images, N tokens, D token width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from blip3o_lit.metrics.cosine import cosine


class Calibration(Metric):
    """Diversity and calibration of K samples a condition."""

    full_state_update = False
    sums: Tensor

    def __init__(self, samples: int) -> None:
        super().__init__()
        if samples < 2:
            raise ValueError("diversity needs two samples a condition or more")
        self.samples = samples
        self.add_state("sums", torch.zeros(8, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, samples_KBND: Tensor, mean_BND: Tensor, true_BND: Tensor) -> None:
        """Add images.

        Args:
            samples_KBND: K samples of each condition.
            mean_BND: The estimate of the posterior mean.
            true_BND: The true tokens.
        """
        samples, mean, true = samples_KBND.double(), mean_BND.double(), true_BND.double()
        average = samples.mean(0)
        pairs = [
            cosine(samples[i], samples[j]).sum() for i in range(len(samples)) for j in range(i)
        ]
        inside = (samples.amin(0) <= true) & (true <= samples.amax(0))
        self.sums += torch.stack(
            [
                torch.tensor(true.numel(), dtype=torch.float64, device=true.device),
                (samples - true).square().sum() / len(samples),
                (mean - true).square().sum(),
                (average - true).square().sum(),
                samples.var(0).sum(),
                inside.sum().double(),
                torch.stack(pairs).sum() / len(pairs) * true.shape[-1],
                cosine(average, true).sum() * true.shape[-1],
            ]
        )

    def compute(self) -> dict[str, Any]:
        """Return the figures, those expected of a calibrated sampler beside them."""
        values, sample, mean, average, spread, inside, pairs, cosine_average = self.sums.tolist()
        k = self.samples
        return {
            "samples": k,
            "pairwise_cosine": pairs / values,
            "mean_of_samples_cosine": cosine_average / values,
            "mse_ratio": sample / mean if mean else None,
            "mse_ratio_expected": 2.0,
            "mean_of_samples_mse_ratio": average / mean if mean else None,
            "mean_of_samples_mse_ratio_expected": 1 + 1 / k,
            "coverage": inside / values,
            "coverage_expected": (k - 1) / (k + 1),
            "spread_skill": ((1 + 1 / k) * spread / average) ** 0.5 if average else None,
        }
