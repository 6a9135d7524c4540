"""What is counted while estimators run: scores, moments, geometry and seconds of each.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.evaluation.estimators import Estimator
from blip3o_lit.metrics.breadth import Breadth
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.metrics.frechet import Moments, frechet_distance

_HALVES = 2


class Tally:
    """Running scores of one estimator or baseline.

    Args:
        predict: The estimator.
        mean_ND: Mean training token of each position.
        shape: Shape of the target tokens.
        device: Where tokens are.
        breadth: Whether geometry, token realism and outlier tokens are scored too.
    """

    def __init__(
        self,
        predict: Estimator,
        mean_ND: Tensor,
        shape: TokenShape,
        device: torch.device,
        breadth: bool = True,
    ) -> None:
        self.predict = predict
        self.scores = TokenScores(mean_ND, shape).to(device)
        self.moments = Moments(shape.width).to(device)
        self.breadth = Breadth(shape, device) if breadth else None
        self.nfe, self.seconds, self.images = 0, 0.0, 0

    def add(self, condition: Tensor, true_BND: Tensor, sample_B: Tensor) -> Tensor:
        """Predict a batch, time it, score it; returns the prediction `[B, N, D]`."""
        _wait_for(condition.device)
        start = time.perf_counter()
        made_BND, self.nfe = self.predict(condition, sample_B)
        _wait_for(condition.device)
        self.seconds += time.perf_counter() - start
        self.images += len(sample_B)
        self.scores.update(made_BND, true_BND)
        self.moments.update(made_BND[:, int(self.scores.shape.cls) :].double().mean(1))
        if self.breadth is not None:
            self.breadth.update(made_BND, true_BND)
        return made_BND

    def image_cosine(self) -> np.ndarray:
        """Return the cosine of each image so far, in the order they were added."""
        return torch.cat(self.scores.image_cosine).cpu().numpy()

    def result(self, reference: Reference) -> dict[str, Any]:
        """Return the scores with Frechet distance to the true tokens, and the speed."""
        scores = self.scores.compute()
        if self.images >= _HALVES:
            scores["frechet"] = frechet_distance(self.moments.compute(), reference.images.compute())
        if self.breadth is not None:
            scores |= self.breadth.compute(reference.tokens)
        scores["seconds_per_image"] = self.seconds / self.images
        return scores


class Reference:
    """Moments of the true patch tokens, singly and averaged over an image, and of two halves."""

    def __init__(self, shape: TokenShape, device: torch.device) -> None:
        self.first, self.device = int(shape.cls), device
        kinds = [Moments(shape.width).to(device) for _ in range(2 * (1 + _HALVES))]
        self.images, self.tokens = kinds[:2]
        self.halves = [(kinds[2], kinds[3]), (kinds[4], kinds[5])]

    def add(self, true_BND: Tensor, sample_B: Tensor) -> None:
        """Add a batch; halves go by sample id."""
        patches = true_BND[:, self.first :].double()
        whole = torch.ones(len(patches), dtype=torch.bool, device=patches.device)
        chosen = [((self.images, self.tokens), whole)]
        for half, pair in enumerate(self.halves):
            chosen.append((pair, (sample_B % _HALVES == half).to(patches.device)))
        for (images, tokens), rows_B in chosen:
            images.update(patches[rows_B].mean(1))
            tokens.update(patches[rows_B].flatten(0, 1))

    def floor(self) -> dict[str, Any]:
        """Return the Frechet distances between two halves of the true images."""
        images = int(self.halves[1][0].count)
        if images < _HALVES:
            return {}
        pairs = zip(("frechet", "frechet_token"), zip(*self.halves))
        distances = {
            name: frechet_distance(*(half.compute() for half in both)) for name, both in pairs
        }
        return {**distances, "images_a_half": images}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
