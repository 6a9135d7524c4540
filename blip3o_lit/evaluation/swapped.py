"""Do the generated tokens follow their own condition? The scores once conditions are swapped.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.evaluation.estimators import Estimator
from blip3o_lit.metrics.cosine import cosine


def swapped(
    estimators: dict[str, Estimator],
    read: Callable[[np.ndarray], tuple[Tensor, Tensor, Tensor]],
    batches: Iterable[np.ndarray],
) -> dict[str, Any]:
    """Score tokens generated from the condition of another image.

    Within a batch every image gets the condition of the next one. A translator that follows its
    condition then scores what two different true images score (`random_pairs`); one that ignores
    it scores as before. A posterior mean may lie a little above: it is smoother than a true image.

    Args:
        estimators: Estimators by name.
        read: Gives raw condition, raw target and sample ids of some ids.
        batches: Ids of the images, in batches; those of a single image are left out.

    Returns:
        `images`, `random_pairs` and the cosine of each estimator.
    """
    sums = dict.fromkeys(["random_pairs", *estimators], 0.0)
    images = 0
    for ids in (part for part in batches if len(part) > 1):
        condition, true_BND, sample_B = read(ids)
        other = torch.roll(condition, -1, 0)
        made = {name: law(other, sample_B)[0] for name, law in estimators.items()}
        made["random_pairs"] = torch.roll(true_BND, -1, 0)
        for name, made_BND in made.items():
            sums[name] += float(cosine(made_BND.double(), true_BND.double()).mean(1).sum())
        images += len(ids)
    return {"images": images, **{name: total / images for name, total in sums.items()}}
