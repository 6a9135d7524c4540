"""What is counted while estimators run: scores, moments, geometry and seconds of each.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config import registry as register
from blip3o_lit.config.errors import UserError
from blip3o_lit.evaluation.estimators import Batch, Estimator
from blip3o_lit.flow.memo import Memo
from blip3o_lit.metrics.breadth import Breadth
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.metrics.frechet import Moments, frechet_distance
from blip3o_lit.metrics.manifolds import Manifolds
from blip3o_lit.metrics.paired import compare

_HALVES = 2


class Tally:
    """Running scores of one estimator or baseline; with `breadth`, more than the cosine's.

    `metrics` are those that other packages have registered. Seconds that the estimator's `memo`
    saved count, so that they are what it takes alone.
    """

    def __init__(
        self,
        predict: Estimator,
        mean_ND: Tensor,
        shape: TokenShape,
        device: torch.device,
        breadth: bool = True,
        metrics: Iterable[str] = (),
        memo: Memo | None = None,
    ) -> None:
        self.predict, self.memo = predict, memo
        self.scores = TokenScores(mean_ND, shape).to(device)
        self.moments = Moments(shape.width).to(device)
        self.breadth = Breadth(shape, device) if breadth else None
        self.own: dict[str, Any] = {}
        for name in metrics if breadth else ():
            metric = register.metric.build(name, shape)
            self.own[name] = metric.to(device) if isinstance(metric, nn.Module) else metric
        self.nfe, self.seconds, self.images = 0, 0.0, 0
        self.maps: dict[str, Any] = {}

    def add(self, batch: Batch) -> Tensor:
        """Predict a batch, time it, score it; returns the prediction `[B, N, D]`."""
        condition, true_BND, sample_B = batch
        memo = self.memo or Memo(condition.device)
        start, saved = memo.now(), memo.saved
        generated_BND, self.nfe = self.predict(condition, sample_B)
        self.seconds += memo.now() - start + memo.saved - saved
        self.images += len(sample_B)
        self.scores.update(generated_BND, true_BND)
        self.moments.update(generated_BND[:, int(self.scores.shape.cls) :].double().mean(1))
        if self.breadth is not None:
            self.breadth.update(generated_BND, true_BND)
        for metric in self.own.values():
            metric.update(generated_BND, true_BND)
        return generated_BND

    def image_cosine(self) -> np.ndarray:
        return torch.cat(self.scores.image_cosine).cpu().numpy()

    def compared_with(self, other: Tally) -> dict[str, Any]:
        """Compare the cosines on the images that both have."""
        images = min(self.images, other.images)
        return compare(self.image_cosine()[:images], other.image_cosine()[:images])

    def result(self, reference: Reference) -> dict[str, Any]:
        """Return the scores, and keep the maps over positions apart, in `maps`."""
        scores = self.scores.compute()
        self.maps = {name: scores.pop(name) for name in ("position_cosine", "position_std")}
        if self.images >= _HALVES:
            truth = reference.whole.images.compute()
            scores["frechet"] = frechet_distance(self.moments.compute(), truth)
        if self.breadth is not None:
            scores |= self.breadth.compute(reference.whole.tokens)
        for name, metric in self.own.items():
            if name in scores:
                raise UserError(f"metrics=[{name}]: a score of this package has that name")
            scores[name] = float(metric.compute())
        scores["seconds_per_image"] = self.seconds / self.images
        return scores


class PatchMoments:
    def __init__(self, width: int, device: torch.device) -> None:
        self.images, self.tokens = Moments(width).to(device), Moments(width).to(device)

    def update(self, patches_BND: Tensor) -> None:
        self.images.update(patches_BND.mean(1))
        self.tokens.update(patches_BND.flatten(0, 1))


class Reference:
    """The true tokens, whole and in two halves by sample id."""

    def __init__(self, shape: TokenShape, device: torch.device) -> None:
        self.first = int(shape.cls)
        self.whole = PatchMoments(shape.width, device)
        self.halves = [PatchMoments(shape.width, device) for _ in range(_HALVES)]
        self.manifolds = Manifolds().to(device)

    def add(self, true_BND: Tensor, sample_B: Tensor) -> None:
        patches_BND = true_BND[:, self.first :].double()
        self.whole.update(patches_BND)
        half_B = sample_B.to(patches_BND.device) % _HALVES
        for number, half in enumerate(self.halves):
            half.update(patches_BND[half_B == number])
        pooled_BD = patches_BND.mean(1)
        self.manifolds.update(pooled_BD[half_B == 0], pooled_BD[half_B == 1])

    def floor(self) -> dict[str, Any]:
        """Return Frechet distances, precision and recall between the halves.

        No estimator need be better.
        """
        even, odd = self.halves
        images = int(odd.images.count)
        if images < _HALVES:
            return {}
        return {
            "frechet": frechet_distance(even.images.compute(), odd.images.compute()),
            "frechet_token": frechet_distance(even.tokens.compute(), odd.tokens.compute()),
            "images_a_half": images,
            **self.manifolds.compute(),
        }
