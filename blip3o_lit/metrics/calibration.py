"""Whether K samples per condition spread as the truth does around what is known.

If samples and truth are drawn from the same posterior, independently, then
  MSE(sample) = 2 MSE(posterior mean),
  MSE(mean of K) = (1 + 1/K) MSE(posterior mean),
  the truth lies between the smallest and largest of K samples in (K - 1) / (K + 1) of all values,
  and spread / skill, sqrt((1 + 1/K) variance among samples / MSE(mean of K)), is 1.
Shape suffixes: K samples, B images, N tokens, D token width.
"""

from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from blip3o_lit.metrics.cosine import cosine


class Calibration(Metric):
    """Diversity and calibration of K samples per condition, beside the estimated posterior mean."""

    full_state_update = False
    images: Tensor
    sums: Tensor

    def __init__(self, samples: int) -> None:
        super().__init__()
        if samples < 2:
            raise ValueError("diversity needs two samples per condition or more")
        self.samples = samples
        self.add_state("images", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(7, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, samples_KBND: Tensor, mean_BND: Tensor, true_BND: Tensor) -> None:
        samples, mean, true = samples_KBND.double(), mean_BND.double(), true_BND.double()
        average = samples.mean(0)
        pairs = torch.stack([cosine(a, b).mean() for a, b in combinations(samples, 2)])
        inside = (samples.amin(0) <= true) & (true <= samples.amax(0))
        means = [
            (samples - true).square().mean(),
            (mean - true).square().mean(),
            (average - true).square().mean(),
            samples.var(0).mean(),
            inside.double().mean(),
            pairs.mean(),
            cosine(average, true).mean(),
        ]
        self.images += len(true)
        self.sums += len(true) * torch.stack(means)

    def compute(self) -> dict[str, Any]:
        means = (self.sums / self.images).tolist()
        sample, mean, average, variance, inside, pairs, cosine_average = means
        k = self.samples
        return {
            "samples": k,
            "pairwise_cosine": pairs,
            "mean_of_samples_cosine": cosine_average,
            "mse_ratio": sample / mean if mean else None,
            "mse_ratio_expected": 2.0,
            "mean_of_samples_mse_ratio": average / mean if mean else None,
            "mean_of_samples_mse_ratio_expected": 1 + 1 / k,
            "coverage": inside,
            "coverage_expected": (k - 1) / (k + 1),
            "spread_skill": ((1 + 1 / k) * variance / average) ** 0.5 if average else None,
        }
