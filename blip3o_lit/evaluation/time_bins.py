"""The held-out training loss by time: where on the path the network errs.

Shape suffixes: B images, N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.flow import draws
from blip3o_lit.flow.draws import Stream
from blip3o_lit.translation.translator import Translator

BINS = 8
SCORES = ("loss", "velocity_cosine", "norm_ratio")
_EDGE = 1e-3
"""Times stay this far from both ends, where not every output has a value."""


@torch.no_grad()
def time_bins(
    translator: Translator,
    read: Callable[[np.ndarray], tuple[Tensor, Tensor, Tensor]],
    batches: Iterable[np.ndarray],
    seed: int,
) -> list[dict[str, Any]]:
    """Return the squared error of the network's output in equal bins of t.

    Each image is put at the middle of every bin with its own noise, so bins differ in nothing but
    the time. The error is in the units of the unscaled output, as `val_loss` is.

    Args:
        translator: The translator.
        read: Gives raw condition, raw target and sample ids of some ids.
        batches: Ids of the images, in batches.
        seed: Seed of the noise.

    Returns:
        `[{"t": [low, high], "loss": x, "velocity_cosine": c, "norm_ratio": r}, ...]` from noise
        (t = 0) to data (t = 1): cosine of implied and true velocity of a whole image, and the mean
        length of the output over that of its target.
    """
    objective = translator.objective
    scale = translator.target_standardizer
    edges = np.linspace(0, 1, BINS + 1)
    found: list[list[tuple[float, ...]]] = [[] for _ in range(BINS)]
    for ids in batches:
        condition, true_BND, sample_B = read(ids)
        condition = translator.condition_standardizer.standardise(condition)
        x1_BND = scale.standardise(true_BND)
        epoch_B = torch.zeros_like(sample_B)
        shape = tuple(x1_BND.shape[1:])
        z_BND = draws.noise(seed, Stream.EVALUATION_NOISE, sample_B, epoch_B, shape, x1_BND.device)
        for number, middle in enumerate((edges[:-1] + edges[1:]) / 2):
            time = float(np.clip(middle, _EDGE, 1 - _EDGE))
            t_B = torch.full((len(ids),), time, device=x1_BND.device)
            with translator.precision(x1_BND.device.type):
                terms = objective.loss(translator.network, condition, x1_BND, z_BND, t_B)
            cosine, ratio = float(terms.velocity_cosine), float(terms.norm_ratio)
            found[number] += [(loss, cosine, ratio) for loss in terms.mse_B.tolist()]
    return [
        {"t": [float(low), float(high)], **dict(zip(SCORES, np.mean(rows, 0).tolist()))}
        for low, high, rows in zip(edges[:-1], edges[1:], found)
    ]
