"""Pairs of times t < s, which train the map from x_t to x_s by two half steps.

The network's output X(x, t, s) is what a step takes the estimate of x1 to be, so that a map is
`Path.step`, and at s = t it is the flow's own estimate. Two maps, over the halves of the way from
t to s, end where one ends whose output is a weighted mean of theirs. This is what the output is
trained towards, without a gradient (shortcut models, Frans et al. 2024, arXiv:2410.12557).

Shapes: x_BND, t_B; B batch, P pairs, N tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.flow.path import Path, over

UNIFORMS = 3
"""Uniform numbers of one sample: whether it is a pair, of which length, and where."""
LEVELS = 7
"""Lengths of a pair's way: 1, 1/2, ... 1/64, each as often. Its place is one of a grid of such
ways, so that the halves of all but the shortest are pairs themselves."""
SHORTEST = 2.0 ** (1 - LEVELS)

MapOutput = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Points x_t, their times t and the ends s to the output X."""


@dataclass(frozen=True)
class Pairs:
    """The rows of a batch that are pairs."""

    rows_P: Tensor
    """Their places in the batch; none may be one."""
    s_P: Tensor
    """Where their maps end."""

    def to(self, device: torch.device) -> Pairs:
        """Return them on a device."""
        rows_P, s_P = (x.to(device, non_blocking=True) for x in (self.rows_P, self.s_P))
        return Pairs(rows_P, s_P)


def pair_times(uniforms_B3: Tensor, t_B: Tensor, config: FlowConfig) -> tuple[Tensor, Pairs]:
    """Turn a share `flow.pairs` of the draws into pairs.

    Args:
        uniforms_B3: Uniform on (0, 1).
        t_B: The draws' own times; those of the others stay.
        config: The flow group.

    Returns:
        The times t `[B]`, and the pairs.
    """
    rows_P = (uniforms_B3[:, 0] < config.pairs).nonzero()[:, 0]
    _, level_P, place_P = uniforms_B3[rows_P].unbind(1)
    length_P = torch.exp2(-(LEVELS * level_P).floor())
    start_P = (place_P / length_P).floor() * length_P
    return t_B.index_copy(0, rows_P, start_P), Pairs(rows_P, start_P + length_P)


@torch.no_grad()
def half_steps(output: MapOutput, path: Path, x_BND: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
    """Return the output whose map from t to s ends where two maps over the halves do.

    The shortest ways are midpoint steps of the flow itself, which all longer ones rest on: two of
    Euler's would lose variance in each.
    """
    middle_B = (t_B + s_B) / 2
    flows_B = s_B - t_B <= SHORTEST
    first_BND = output(x_BND, t_B, torch.where(flows_B, t_B, middle_B))
    middle_BND = path.step(x_BND, first_BND, t_B, middle_B)
    second_BND = output(middle_BND, middle_B, torch.where(flows_B, middle_B, s_B))
    share_B = first_share(path, t_B, middle_B, s_B).masked_fill(flows_B, 0)
    return torch.lerp(second_BND, first_BND, over(share_B, x_BND))


def first_share(path: Path, t_B: Tensor, middle_B: Tensor, s_B: Tensor) -> Tensor:
    """Return the weight of the first half's output: (r(m) - r(t)) / (r(s) - r(t)), r alpha/sigma.

    Written with sigma(s) above the line, which may be zero.
    """
    alpha, sigma = path.alpha, path.sigma
    start_B = alpha(t_B) / sigma(t_B)
    first_B = alpha(middle_B) / sigma(middle_B) - start_B
    return sigma(s_B) * first_B / (alpha(s_B) - start_B * sigma(s_B))
