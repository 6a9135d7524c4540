"""Precision and recall of a set of samples, by manifolds of nearest neighbours.

The manifold of a set is the union of balls around its vectors, each as wide as the distance to its
K-th neighbour in the set (Kynkäänniemi et al. 2019, arXiv:1904.06991). Precision is the share of
samples inside the true manifold, recall the share of true vectors inside the samples'. Both are
read beside those of two halves of the true set.

Shape suffixes: B and C vectors, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

NEIGHBOURS = 3
_CHUNK = 1024


class Manifolds(Metric):
    """Precision and recall of vectors; none where a set has K vectors or fewer."""

    full_state_update = False
    samples: list[Tensor]
    true: list[Tensor]

    def __init__(self, neighbours: int = NEIGHBOURS) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.add_state("samples", [], dist_reduce_fx="cat")
        self.add_state("true", [], dist_reduce_fx="cat")

    def update(self, samples_BD: Tensor, true_CD: Tensor) -> None:
        """Add to both sets, which may differ in size."""
        self.samples.append(samples_BD.float())
        self.true.append(true_CD.float())

    def compute(self) -> dict[str, float]:
        samples_BD, true_CD = dim_zero_cat(self.samples), dim_zero_cat(self.true)
        if min(len(samples_BD), len(true_CD)) <= self.neighbours:
            return {}
        return {
            "precision": self._inside(samples_BD, true_CD),
            "recall": self._inside(true_CD, samples_BD),
        }

    def _inside(self, vectors_BD: Tensor, centres_CD: Tensor) -> float:
        """Return the share of vectors in the manifold of the centres."""
        radii = [  # the nearest of all is the centre itself
            _distances(part, centres_CD).kthvalue(self.neighbours + 1, dim=1).values
            for part in centres_CD.split(_CHUNK)
        ]
        radius_C = torch.cat(radii)
        inside = [
            (_distances(part, centres_CD) <= radius_C).any(1) for part in vectors_BD.split(_CHUNK)
        ]
        return float(torch.cat(inside).double().mean())


def _distances(a_BD: Tensor, b_CD: Tensor) -> Tensor:
    # By differences: products would round the distance of equal vectors up from zero.
    return torch.cdist(a_BD, b_CD, compute_mode="donot_use_mm_for_euclid_dist")
