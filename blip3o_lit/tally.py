"""What is counted while estimators run: scores, moments, recall and seconds of each.

Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width,
P embedding width.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.metrics.frechet import Moments, frechet_distance
from blip3o_lit.metrics.retrieval import Retrieval
from blip3o_lit.tokens.linear_gaussian import PROBLEM, Problem
from blip3o_lit.tokens.reader import TokenReader

Estimator = Callable[[Tensor, Tensor], tuple[Tensor, int]]
"""(raw condition [B, M, C], sample ids [B]) -> (raw target tokens [B, N, D], evaluations)."""
ReadOut = Callable[[Tensor], Tensor]
"""Raw target tokens [B, N, D] -> image embeddings [B, P]."""


_HALVES = 2


@dataclass
class Tally:
    """Running scores of one estimator or baseline."""

    predict: Estimator
    scores: TokenScores
    moments: Moments
    retrieval: Retrieval = field(default_factory=Retrieval)
    nfe: int = 0
    seconds: float = 0.0
    images: int = 0

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
        return made_BND

    def result(self, true: Moments) -> dict[str, Any]:
        """Return the scores with Frechet distance to the true tokens, and the speed."""
        scores = self.scores.compute()
        if self.images >= _HALVES:
            scores["frechet"] = frechet_distance(self.moments.compute(), true.compute())
        scores["seconds_per_image"] = self.seconds / self.images
        return scores


class Reference:
    """What the true tokens of one pass give: moments, those of two halves, and recall."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.true, *self.halves = (Moments(width).to(device) for _ in range(1 + _HALVES))
        self.retrieval, self.mean_token, self.chance = Retrieval(), Retrieval(), Retrieval()

    def add(self, pooled_BD: Tensor, sample_B: Tensor) -> None:
        """Add the mean patch tokens of a batch; halves go by sample id."""
        self.true.update(pooled_BD)
        for half, moments in enumerate(self.halves):
            moments.update(pooled_BD[(sample_B % _HALVES == half).to(pooled_BD.device)])

    def floor(self) -> dict[str, Any]:
        """Return the Frechet distance between two halves of the true images."""
        images = int(self.halves[1].count)
        if images < _HALVES:
            return {}
        first, second = (half.compute() for half in self.halves)
        return {
            "frechet": frechet_distance(first, second),
            "images_a_half": images,
            "of": "mean patch token of an image",
        }


def read_out(reader: TokenReader, device: torch.device) -> tuple[str, ReadOut | None]:
    """Return how target tokens become an image embedding, by name and as a function.

    CLS through the tower's head where the view has it, else the mean of the projected patches,
    which is not what the tower was trained for. None where the store has no caption embeddings of
    the target's tower, or no head.
    """
    index = reader.store.index
    texts = [spec for spec in index.arrays.values() if spec.kind == "text"]
    target = index.arrays[reader.target]
    if not texts or texts[0].tower != target.tower:
        return "none", None
    cls = reader.shape.target.cls
    name = "cls" if cls else "patch_mean"
    if reader.mode.projected:
        return name, lambda tokens_BND: tokens_BND[:, 0] if cls else tokens_BND.mean(1)
    if not (Path(reader.store.path) / "heads.safetensors").is_file():
        return "none", None
    head = reader.store.head(reader.target).to(device)
    return (
        name,
        lambda tokens_BND: head(tokens_BND[:, :1])[:, 0] if cls else head(tokens_BND).mean(1),
    )


def known_problem(reader: TokenReader) -> Problem | None:
    """Return the law of the tokens where the store was drawn from a known one."""
    plain = reader.mode.name == "patch_only" and reader.condition == "eva"
    path = Path(reader.store.path)
    return Problem.load(path) if plain and (path / PROBLEM).is_file() else None


def exact_estimators(problem: Problem | None) -> dict[str, Estimator]:
    """Return the exact posterior mean and an exact posterior sample as estimators, in this order.

    Their squared errors are tr Cov[x1|c] / D and twice that, in expectation.
    """
    if problem is None:
        return {}
    random = torch.Generator().manual_seed(0)

    def mean(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        return problem.posterior_mean(condition_BMC.cpu()).to(condition_BMC.device), 0

    def sample(condition_BMC: Tensor, sample_B: Tensor) -> tuple[Tensor, int]:
        return problem.posterior_sample(condition_BMC.cpu(), random).to(condition_BMC.device), 0

    return {"mean": mean, "sample": sample}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
