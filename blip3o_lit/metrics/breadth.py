"""Beyond the cosine: geometry, realism of single tokens and outlier tokens, of patches alone.

Shape suffixes: B images, N tokens (CLS first where there is one), D token width.
"""

from typing import Any

import torch
from torch import Tensor

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.metrics.frechet import Moments, frechet_distance
from blip3o_lit.metrics.manifolds import Manifolds
from blip3o_lit.metrics.norms import CosineByNorm
from blip3o_lit.metrics.structure import LinearCka, MutualNeighbours


class Breadth:
    """What one estimator gets beside its scores."""

    def __init__(self, shape: TokenShape, device: torch.device) -> None:
        self.first = int(shape.cls)
        self.tokens = Moments(shape.width).to(device)
        self.cka_image, self.cka_token = LinearCka().to(device), LinearCka().to(device)
        self.neighbours = MutualNeighbours().to(device)
        self.by_norm = CosineByNorm().to(device)
        self.manifolds = Manifolds().to(device)

    def update(self, generated_BND: Tensor, true_BND: Tensor) -> None:
        generated, true = generated_BND[:, self.first :], true_BND[:, self.first :]
        generated_BD, true_BD = generated.double().mean(1), true.double().mean(1)
        self.tokens.update(generated.flatten(0, 1))
        self.cka_image.update(generated_BD[None], true_BD[None])
        self.cka_token.update(generated, true)
        self.neighbours.update(generated_BD, true_BD)
        self.by_norm.update(generated, true)
        self.manifolds.update(generated_BD, true_BD)

    def compute(self, true_tokens: Moments) -> dict[str, Any]:
        return {
            "cka_image": self.cka_image.compute(),
            "cka_token": self.cka_token.compute(),
            "mutual_knn": self.neighbours.compute(),
            "frechet_token": frechet_distance(self.tokens.compute(), true_tokens.compute()),
            "cosine_by_norm": self.by_norm.compute(),
            **self.manifolds.compute(),
        }
