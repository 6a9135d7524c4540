"""Whether two sets of vectors have the same geometry: linear CKA and shared nearest neighbours.

Shape suffixes: G groups, n vectors of a group, D and E channels, B images, K neighbours.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

NEIGHBOURS = 10
_CHUNK = 1024


def unbiased_hsic(k_Gnn: Tensor, l_Gnn: Tensor) -> Tensor:
    """Return the unbiased HSIC `[G]` of two Gram matrices (Song et al. 2012, equation 5).

    Diagonals are ignored, so the estimate has expectation zero for independent vectors at any n
    from 4 on, where the usual estimator grows with D / n.
    """
    n = k_Gnn.shape[-1]
    off = 1 - torch.eye(n, dtype=k_Gnn.dtype, device=k_Gnn.device)
    k, m = k_Gnn * off, l_Gnn * off
    rows_k, rows_m = k.sum(-1), m.sum(-1)
    trace = (k * m).sum((-2, -1))
    total = rows_k.sum(-1) * rows_m.sum(-1) / ((n - 1) * (n - 2))
    cross = 2 * (rows_k * rows_m).sum(-1) / (n - 2)
    return (trace + total - cross) / (n * (n - 3))


class LinearCka(Metric):
    """Linear centred kernel alignment by groups: 1 for equal geometry, about 0 for unrelated.

    Sums of the unbiased HSIC over groups (Nguyen, Raghu and Kornblith 2021), so any number of
    vectors streams through. A group is a batch of image vectors, or the tokens of one image. None
    where one side does not vary.
    """

    full_state_update = False
    xy: Tensor
    xx: Tensor
    yy: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("xy", "xx", "yy"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, x_GnD: Tensor, y_GnE: Tensor) -> None:
        """Add groups; groups of fewer than four vectors have no estimate and are left out."""
        if x_GnD.shape[1] < 4:
            return
        x, y = (v.double() - v.double().mean(1, keepdim=True) for v in (x_GnD, y_GnE))
        k, m = x @ x.mT, y @ y.mT
        self.xy += unbiased_hsic(k, m).sum()
        self.xx += unbiased_hsic(k, k).sum()
        self.yy += unbiased_hsic(m, m).sum()

    def compute(self) -> float | None:
        if self.xx <= 0 or self.yy <= 0:
            return None
        return float(self.xy / (self.xx * self.yy).sqrt())


class MutualNeighbours(Metric):
    """Share of the K nearest neighbours (by cosine) that an image has in both sets.

    Huh et al. 2024. Random neighbours share K / (images - 1). None for K images or fewer.
    """

    full_state_update = False
    x: list[Tensor]
    y: list[Tensor]

    def __init__(self, neighbours: int = NEIGHBOURS) -> None:
        super().__init__()
        self.neighbours = neighbours
        self.add_state("x", [], dist_reduce_fx="cat")
        self.add_state("y", [], dist_reduce_fx="cat")

    def update(self, x_BD: Tensor, y_BE: Tensor) -> None:
        self.x.append(F.normalize(x_BD.float(), dim=-1))
        self.y.append(F.normalize(y_BE.float(), dim=-1))

    def compute(self) -> float | None:
        x_BD, y_BE = dim_zero_cat(self.x), dim_zero_cat(self.y)
        if len(x_BD) <= self.neighbours + 1:
            return None
        shared = 0.0
        for start in range(0, len(x_BD), _CHUNK):
            first, second = (self._nearest(v, start) for v in (x_BD, y_BE))
            shared += float((first[:, :, None] == second[:, None, :]).sum())
        return shared / (len(x_BD) * self.neighbours)

    def _nearest(self, vectors_BD: Tensor, start: int) -> Tensor:
        """Return the neighbours `[b, K]` of a chunk of images."""
        rows = torch.arange(start, min(start + _CHUNK, len(vectors_BD)), device=vectors_BD.device)
        scores = vectors_BD[rows] @ vectors_BD.T
        scores[torch.arange(len(rows)), rows] = -torch.inf
        return scores.topk(self.neighbours, dim=1).indices
