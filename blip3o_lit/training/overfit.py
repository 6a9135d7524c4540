"""Has a run learnt its training images by heart? Their tokens are generated, not merely denoised.

The check that `experiment=overfitting` passes or fails: the run's own solver starts from noise that
training never saw and has to reach evaluation.overfit_at_least on the training images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from blip3o_lit.config.train import TrainConfig
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.translation.translator import Translator

FAILED_CODE = 1
BATCH = 16


@dataclass(frozen=True)
class Overfit:
    cosine: float
    at_least: float
    images: int
    estimator: str
    split: str = "train"

    @property
    def passed(self) -> bool:
        return self.cosine >= self.at_least

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    def __str__(self) -> str:
        sign, word = (">=", "passed") if self.passed else ("<", "FAILED")
        return (
            f"overfit check {word}: cosine {self.cosine:.4f} {sign} {self.at_least:g}, "
            f"{self.estimator}, {self.images} training images"
        )


@torch.no_grad()
def check_overfit(
    config: TrainConfig, translator: Translator, data: TokenDataModule, at_least: float
) -> Overfit:
    """Generate the first evaluation.images training images and score them in the raw space."""
    reader = data.train
    device = next(translator.network.parameters()).device
    images = min(len(reader), config.evaluation.images)
    scores = TokenScores(data.target_standardizer.mean_NC, data.shape.target).to(device)
    for ids in torch.arange(images).split(BATCH):
        batch = reader.read(ids.numpy())
        condition, target = batch["condition"].to(device), batch["target"].to(device)
        sample = translator.generate(condition, ids, config.seed, config.solver)
        scores.update(sample.x1_BND, target)
    cosine = float(scores.compute()["cosine"])
    return Overfit(cosine, at_least, images, config.solver.label)
