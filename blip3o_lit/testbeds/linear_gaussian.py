"""The `linear_gaussian` testbed: x1 = mu + A c + B e for each token, its posterior Gaussian."""

from dataclasses import asdict
from pathlib import Path

import torch

from blip3o_lit.config.data import LinearGaussianConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.testbeds.law import Problem, Size, build, gaussian_law

OUTLIER = 30.0
"""Scale of an outlier channel relative to the others."""


def draw(config: LinearGaussianConfig) -> Problem:
    smaller = min(config.condition_width, config.target_width)
    if not 0 <= config.rank <= smaller:
        raise UserError(
            f"data.linear_gaussian.rank={config.rank} must be between 0 (full) and {smaller}, "
            "the smaller width"
        )
    if not 0 <= config.outlier_channels <= config.target_width:
        raise UserError(
            f"data.linear_gaussian.outlier_channels={config.outlier_channels} must be between 0 "
            f"and data.linear_gaussian.target_width={config.target_width}"
        )
    return gaussian_law(
        config.condition_width,
        config.target_width,
        config.explained,
        config.rank or smaller,
        OUTLIER,
        config.outlier_channels,
        torch.Generator().manual_seed(config.seed),
    )


def linear_gaussian_store(config: LinearGaussianConfig) -> Path:
    """Return the store of a configuration, built on first use."""
    images = {"train": config.images, "validation": config.validation_images}
    size = Size(images, config.grid, config.seed)
    return build("linear_gaussian", asdict(config), draw(config), size)
