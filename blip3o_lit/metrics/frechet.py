"""Frechet distance between two sets of vectors, each taken as a Gaussian.

d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2))  (Dowson and Landau 1982, FID).
The estimate is biased upwards when vectors are few (n of the order of D or less), so a distance is
only read beside the floor: the distance between two halves of the true set.
Shape suffixes: B vectors, D channels.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class Moments(Metric):
    """Mean `[D]` and unbiased covariance `[D, D]` of vectors, from float64 sums."""

    full_state_update = False
    count: Tensor
    sum_D: Tensor
    outer_DD: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        for name, size in (("count", ()), ("sum_D", (width,)), ("outer_DD", (width, width))):
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, vectors_BD: Tensor) -> None:
        vectors = vectors_BD.double()
        self.count += len(vectors)
        self.sum_D += vectors.sum(0)
        self.outer_DD += vectors.T @ vectors

    def compute(self) -> tuple[Tensor, Tensor]:
        if self.count < 2:
            raise ValueError("a covariance needs two vectors or more")
        mean = self.sum_D / self.count
        centred = self.outer_DD - self.count * torch.outer(mean, mean)
        return mean, centred / (self.count - 1)


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Return the squared Frechet distance of two (mean `[D]`, covariance `[D, D]`) pairs.

    The trace of (S_a S_b)^(1/2) is taken from the eigenvalues of the symmetric
    S_a^(1/2) S_b S_a^(1/2), so no general matrix square root is needed.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(distance.clamp(min=0))
