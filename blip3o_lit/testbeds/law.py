"""Token laws with a known posterior: x1 = mu + A c + m_k + B e, c and e normal, k a mode.

Given c, the tokens of an image are a mixture of Gaussians: one mode k for the whole image, drawn
with fixed weights and independent of c; covariance B B^T a token. So E[x1|c] = mu + A c (modes are
centred), exact samples are cheap, and a trained flow can be compared with both.

Shapes: condition_BNC, target_BND; B batch, N tokens, C condition width, D target width, K modes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_lit.base.files import replacing
from blip3o_lit.base.home import home
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter

VERSION = 2
"""Raised when the same configuration would give other tokens or another problem file."""
PROBLEM = "problem.safetensors"
BLOCK = 2048
"""Images drawn at once, and images a shard."""


@dataclass(frozen=True)
class Problem:
    """The law of the tokens, float64; means and draws are `[B, N, D]`."""

    mean_D: Tensor
    """mu, the mean token."""
    map_DC: Tensor
    """A."""
    covariance_DD: Tensor
    """B B^T: the covariance within a mode of one token; tokens are independent given c and k."""
    modes_KD: Tensor
    """m_k, their weighted mean zero."""
    weights_K: Tensor
    """Probability of each mode."""

    @classmethod
    def load(cls, store: Path | str) -> Problem:
        """Read a store's problem; a UserError where it has none."""
        path = Path(store) / PROBLEM
        if not path.exists():
            raise UserError(f"{store} has no {PROBLEM}: its optimum is not known in closed form")
        return cls(**load_file(path))

    def posterior_mean(self, condition_BNC: Tensor) -> Tensor:
        return self.mean_D + condition_BNC.double() @ self.map_DC.T

    def posterior_sample(self, condition_BNC: Tensor, generator: torch.Generator) -> Tensor:
        mean_BND = self.posterior_mean(condition_BNC)
        factor_DD = torch.linalg.cholesky(self.covariance_DD)
        noise_BND = torch.randn(mean_BND.shape, generator=generator, dtype=torch.float64)
        x_BND = mean_BND + noise_BND @ factor_DD.T
        if len(self.modes_KD) == 1:
            return x_BND
        mode_B = torch.multinomial(self.weights_K, len(x_BND), True, generator=generator)
        return x_BND + self.modes_KD[mode_B].unsqueeze(1)

    def token_error(self) -> float:
        """Return the mean squared error of the posterior mean: tr Cov[x1|c] / D."""
        between = (self.weights_K[:, None] * self.modes_KD.square()).sum()
        return float(self.covariance_DD.trace() + between) / len(self.mean_D)


@dataclass(frozen=True)
class Size:
    """How much of a problem to draw."""

    images: dict[str, int]  # per split
    grid: int  # side
    seed: int


def gaussian_law(
    condition_width: int,
    target_width: int,
    explained: float,
    rank: int,
    scale: float,
    outliers: int,
    random: torch.Generator,
) -> Problem:
    """Draw a problem with one mode.

    The condition explains a share of every channel's variance, exactly: the rows of A, which has
    the given rank, have norm s sqrt(explained), those of B norm s sqrt(1 - explained), s the
    channel's scale. `scale` is a further factor on the first channels, the `outliers`.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    map_DC = normal(target_width, rank) @ normal(rank, condition_width)
    decay_D = torch.linspace(1, 0.3, target_width, dtype=torch.float64)
    residual_DD = normal(target_width, target_width) * decay_D
    scale_D = torch.exp(0.4 * normal(target_width))
    scale_D[:outliers] *= scale
    mean_D = 0.5 * scale_D * normal(target_width)
    map_DC = F.normalize(map_DC, dim=1) * (scale_D * explained**0.5)[:, None]
    residual_DD = F.normalize(residual_DD, dim=1) * (scale_D * (1 - explained) ** 0.5)[:, None]
    one = torch.ones(1, dtype=torch.float64)
    modes_KD = torch.zeros(1, target_width, dtype=torch.float64)
    return Problem(mean_D, map_DC, residual_DD @ residual_DD.T, modes_KD, one)


def build(name: str, options: dict[str, Any], problem: Problem, size: Size) -> Path:
    """Return the store of a problem, built on first use and cached by its options' hash.

    It appears in one rename, so an interrupted build leaves nothing half done. `options` is
    everything that determines the problem and its draws.
    """
    description = json.dumps({"version": VERSION, **options}, sort_keys=True)
    digest = hashlib.sha256(description.encode()).hexdigest()[:16]
    store = home() / name / digest
    if (store / "index.json").exists():
        return store
    unfinished = store.with_name(f".{digest}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(unfinished, name, problem, size)
        with replacing(unfinished / PROBLEM) as temporary:
            save_file(dict(vars(problem)), temporary, metadata={"options": description})
        try:
            unfinished.replace(store)
        except OSError:  # another process may have been faster
            if not (store / "index.json").exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return store


def _write(folder: Path, name: str, problem: Problem, size: Size) -> None:
    D, C = problem.map_DC.shape
    tokens, grid = size.grid**2, (size.grid, size.grid)
    arrays = {
        array: ArraySpec("tokens", "float16", (tokens, width), grid=grid, tower=name)
        for array, width in (("eva", C), ("clip", D))
    }
    with TokenWriter(folder, arrays, BLOCK, split_rule="independent draws") as writer:
        for number, (split, images) in enumerate(size.images.items()):
            random = torch.Generator().manual_seed(2 * size.seed + number + 1_000_003)
            for first in range(0, images, BLOCK):
                count = min(BLOCK, images - first)
                # Rounded first, so that the stored target follows from the stored condition.
                c = torch.randn(count, tokens, C, generator=random).half()
                x = problem.posterior_sample(c, random)
                for row, (eva, clip) in enumerate(zip(c.numpy(), x.numpy())):
                    writer.add(split, f"{first + row:08d}", {"eva": eva, "clip": clip})
