"""A token store whose posterior is known: x1 = mu + A c + B e for each token, c and e normal.

E[x1|c] = mu + A c and Cov[x1|c] = B B^T, so the best mean and exact posterior samples can be
scored, and a trained flow compared with them. Channel variances and their explained share are
exact: the rows of A have norm s sqrt(explained), those of B norm s sqrt(1 - explained), where s is
the channel's scale.

Shapes: c_BNC conditions, x_BND targets; B batch, N tokens, C condition width, D target width,
R rank of A.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_lit.config.data import LinearGaussianConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.home import home
from blip3o_lit.tokens.shards import ArraySpec, TokenWriter

VERSION = 1
"""Raised when the same configuration would give other tokens."""
PROBLEM = "problem.safetensors"
OUTLIER = 30.0
"""Scale of an outlier channel relative to the others."""
BLOCK = 2048
"""Images drawn at once, and images a shard."""


@dataclass(frozen=True)
class Problem:
    """The law of the tokens, float64."""

    mean_D: Tensor
    """mu."""
    map_DC: Tensor
    """A."""
    covariance_DD: Tensor
    """Cov[x1|c] = B B^T, of one token; tokens are independent given their conditions."""

    @classmethod
    def draw(cls, config: LinearGaussianConfig) -> Problem:
        """Draw the problem of a configuration.

        Raises:
            UserError: If the rank or the number of outlier channels exceeds the widths.
        """
        C, D = config.condition_width, config.target_width
        if not 0 <= config.rank <= min(C, D):
            raise UserError(
                f"data.linear_gaussian.rank={config.rank} must be between 0 (full) and "
                f"{min(C, D)}, the smaller width"
            )
        if not 0 <= config.outlier_channels <= D:
            raise UserError(
                f"data.linear_gaussian.outlier_channels={config.outlier_channels} must be between "
                f"0 and data.linear_gaussian.target_width={D}"
            )
        random = torch.Generator().manual_seed(config.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random, dtype=torch.float64)

        rank = config.rank or min(C, D)
        map_DC = normal(D, rank) @ normal(rank, C)
        decay_D = torch.linspace(1, 0.3, D, dtype=torch.float64)
        residual_DD = normal(D, D) * decay_D
        scale_D = torch.exp(0.4 * normal(D))
        scale_D[: config.outlier_channels] *= OUTLIER
        mean_D = 0.5 * scale_D * normal(D)
        map_DC = F.normalize(map_DC, dim=1) * (scale_D * config.explained**0.5)[:, None]
        left = (1 - config.explained) ** 0.5
        residual_DD = F.normalize(residual_DD, dim=1) * (scale_D * left)[:, None]
        return cls(mean_D, map_DC, residual_DD @ residual_DD.T)

    @classmethod
    def load(cls, store: Path | str) -> Problem:
        """Read the problem of a store that `linear_gaussian_store` wrote.

        Raises:
            UserError: If the store has none.
        """
        path = Path(store) / PROBLEM
        if not path.exists():
            raise UserError(f"{store} has no {PROBLEM}: only data=linear_gaussian has an optimum")
        tensors = load_file(path)
        return cls(tensors["mean"], tensors["map"], tensors["covariance"])

    def posterior_mean(self, condition_BNC: Tensor) -> Tensor:
        """Return E[x1|c] in float64, `[B, N, D]`."""
        return self.mean_D + condition_BNC.double() @ self.map_DC.T

    def posterior_sample(self, condition_BNC: Tensor, generator: torch.Generator) -> Tensor:
        """Return exact draws from p(x1|c) in float64, `[B, N, D]`."""
        mean_BND = self.posterior_mean(condition_BNC)
        factor_DD = torch.linalg.cholesky(self.covariance_DD)
        noise_BND = torch.randn(mean_BND.shape, generator=generator, dtype=torch.float64)
        return mean_BND + noise_BND @ factor_DD.T


def linear_gaussian_store(config: LinearGaussianConfig) -> Path:
    """Return the store of a configuration, built on first use (seconds) and cached by its hash.

    It appears in one rename, so an interrupted build leaves nothing half done.

    Raises:
        UserError: If the configuration is impossible.
    """
    description = json.dumps({"version": VERSION, **asdict(config)}, sort_keys=True)
    digest = hashlib.sha256(description.encode()).hexdigest()[:16]
    store = home() / "linear_gaussian" / digest
    if (store / "index.json").exists():
        return store
    problem = Problem.draw(config)
    unfinished = store.with_name(f".{digest}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        _write(unfinished, problem, config)
        save_file(
            {"mean": problem.mean_D, "map": problem.map_DC, "covariance": problem.covariance_DD},
            unfinished / PROBLEM,
            metadata={"config": description},
        )
        _publish(unfinished, store)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return store


def _publish(unfinished: Path, store: Path) -> None:
    """Move the finished folder to its name; another process may have been faster."""
    try:
        unfinished.replace(store)
    except OSError:
        if not (store / "index.json").exists():
            raise


def _write(folder: Path, problem: Problem, config: LinearGaussianConfig) -> None:
    """Draw and write all images.

    Conditions are rounded to their stored float16 first, so that the stored target follows from
    the stored condition exactly (up to its own rounding, 5e-4 relative).
    """
    N, grid = config.grid**2, (config.grid, config.grid)
    arrays = {
        "eva": _spec(N, config.condition_width, grid),
        "clip": _spec(N, config.target_width, grid),
    }
    splits = {"train": config.images, "validation": config.validation_images}
    with TokenWriter(folder, arrays, BLOCK, split_rule="independent draws") as writer:
        for number, (split, images) in enumerate(splits.items()):
            random = torch.Generator().manual_seed(2 * config.seed + number + 1_000_003)
            for first in range(0, images, BLOCK):
                count = min(BLOCK, images - first)
                c = torch.randn(count, N, config.condition_width, generator=random).half()
                x = problem.posterior_sample(c, random)
                for row, (eva, clip) in enumerate(zip(c.numpy(), x.numpy())):
                    writer.add(split, f"{first + row:08d}", {"eva": eva, "clip": clip})


def _spec(tokens: int, width: int, grid: tuple[int, int]) -> ArraySpec:
    return ArraySpec("tokens", "float16", (tokens, width), grid=grid, tower="linear_gaussian")


def posterior_mean(store: Path | str, condition_BNC: Tensor) -> Tensor:
    """Return the exact E[x1|c] of a store's problem in float64, `[B, N, D]`."""
    return Problem.load(store).posterior_mean(condition_BNC)


def optimum(
    store: Path | str,
    condition_BNC: Tensor,
    target_BND: Tensor,
    draws: int = 8,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Score the exact posterior mean and exact posterior samples on given tokens.

    Args:
        store: A store that `linear_gaussian_store` wrote.
        condition_BNC: Raw condition tokens.
        target_BND: Raw target tokens.
        draws: Posterior samples an image; their scores are averaged.
        seed: Seed of these draws.

    Returns:
        `mean` and `sample`, each with `cosine`, `cosine_centred`, `cosine_pooled`, `mse`, `r2` and
        `norm_ratio` as evaluation.json defines them (the centre is the exact mean token), and
        `expected_mse`, the closed form that `mse` estimates: tr Cov[x1|c] / D, twice it for
        samples.

    Raises:
        UserError: If the store has no known posterior.
    """
    problem = Problem.load(store)
    target_BND = target_BND.double()
    random = torch.Generator().manual_seed(seed)
    expected = float(problem.covariance_DD.trace()) / target_BND.shape[-1]
    mean = _scores(problem.posterior_mean(condition_BNC), target_BND, problem.mean_D)
    samples = [
        _scores(problem.posterior_sample(condition_BNC, random), target_BND, problem.mean_D)
        for _ in range(draws)
    ]
    average = {key: float(np.mean([one[key] for one in samples])) for key in mean}
    return {
        "mean": {**mean, "expected_mse": expected},
        "sample": {**average, "expected_mse": 2 * expected},
    }


def _scores(generated_BND: Tensor, true_BND: Tensor, centre_D: Tensor) -> dict[str, float]:
    """Return the scores of `optimum` for one set of generated tokens, both float64."""
    error = (generated_BND - true_BND).square()
    generated_centred, true_centred = generated_BND - centre_D, true_BND - centre_D
    cosines = {
        "cosine": F.cosine_similarity(generated_BND, true_BND, dim=-1),
        "cosine_centred": F.cosine_similarity(generated_centred, true_centred, dim=-1),
        "cosine_pooled": F.cosine_similarity(generated_BND.mean(1), true_BND.mean(1), dim=-1),
    }
    norms = [tokens.norm(dim=-1).mean() for tokens in (generated_BND, true_BND)]
    return {
        **{name: float(values.mean()) for name, values in cosines.items()},
        "mse": float(error.mean()),
        "r2": 1 - float(error.sum() / true_centred.square().sum()),
        "norm_ratio": float(norms[0] / norms[1]),
    }
