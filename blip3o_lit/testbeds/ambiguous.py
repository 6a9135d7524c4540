"""The `ambiguous` testbed: several right targets per condition, and how well samples cover them.

The posterior mean lies between the modes, so a regressor's tokens belong to none of them however
well it is trained; samples must reach every mode as often as its weight says, with all tokens of
an image in the same one.

Shapes: B batch, N tokens, C condition width, D target width, K modes.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.config.data import AmbiguousConfig
from blip3o_lit.testbeds.law import Problem, Size, build, gaussian_law


def draw(config: AmbiguousConfig) -> Problem:
    """Draw modes at equal distances, in standard deviations of a token within its mode.

    m_k = L q_k separation / sqrt 2, q_k orthonormal, L L^T = B B^T, then centred.
    """
    random = torch.Generator().manual_seed(config.seed)
    smaller = min(config.condition_width, config.target_width)
    law = gaussian_law(
        config.condition_width, config.target_width, config.explained, smaller, 1.0, 0, random
    )
    width = config.target_width
    square_DD = torch.randn(width, width, generator=random, dtype=torch.float64)
    basis_KD = torch.linalg.qr(square_DD).Q[: len(config.weights)]
    factor_DD = torch.linalg.cholesky(law.covariance_DD)
    weights_K = torch.tensor(config.weights, dtype=torch.float64)
    modes_KD = config.separation / 2**0.5 * basis_KD @ factor_DD.T
    return replace(law, modes_KD=modes_KD - weights_K @ modes_KD, weights_K=weights_K)


def ambiguous_store(config: AmbiguousConfig) -> Path:
    """Return the store of a configuration, built on first use."""
    images = {"train": config.images, "validation": config.validation_images}
    size = Size(images, config.grid, config.seed)
    return build("ambiguous", asdict(config), draw(config), size)


def coverage(store: Path | str, condition_BNC: Tensor, generated_BND: Tensor) -> dict[str, Any]:
    """Score how generated tokens cover the modes of their conditions.

    Tokens are raw, the store is one that `ambiguous_store` wrote.

    Returns:
        `weights`: the true probability of each mode; `shares`: the share of images nearest to it;
        `covered`: modes whose share is at least half their weight; `weight_error`: largest
        |share - weight|; `spread`: mean squared distance to the image's mode in units of a correct
        sample's (1 is right, 0 has no spread, far above 1 lies between modes); `agreement`: share
        of tokens that are nearest to their image's mode.
    """
    problem = Problem.load(store)
    residual_BND = generated_BND.double() - problem.posterior_mean(condition_BNC)
    offsets_BNKD = residual_BND.unsqueeze(2) - problem.modes_KD
    inverse_DD = torch.linalg.inv(torch.linalg.cholesky(problem.covariance_DD))
    distance_BNK = (offsets_BNKD @ inverse_DD.T).square().mean(-1)
    mode_B = distance_BNK.mean(1).argmin(-1)
    chosen_BN = distance_BNK.gather(2, mode_B[:, None, None].expand(-1, len(residual_BND[0]), 1))
    shares_K = torch.bincount(mode_B, minlength=len(problem.weights_K)).double() / len(mode_B)
    return {
        "weights": problem.weights_K.tolist(),
        "shares": shares_K.tolist(),
        "covered": int((shares_K >= problem.weights_K / 2).sum()),
        "weight_error": float((shares_K - problem.weights_K).abs().max()),
        "spread": float(chosen_BN.mean()),
        "agreement": float((distance_BNK.argmin(-1) == mode_B[:, None]).double().mean()),
    }
