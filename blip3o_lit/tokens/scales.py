"""The token scales of a translator: one standardizer for each side that it has."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from blip3o_lit.base.condition import AnyCondition, Condition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.tokens.statistics import Standardizer

STEP = 8
"""Words are padded to one less than a multiple of it: with the null token of a network before them
their number is such a multiple, which attention kernels read fastest, and batches of captions have
few shapes."""


def padded(longest: int) -> int:
    """Return how many tokens a network gets for a batch whose longest caption has `longest`."""
    return longest + -(longest + 1) % STEP


def identity_scales(shape: PairShape) -> dict[str, Standardizer]:
    """Return scales that change nothing by their names in a translator: those of its sides."""
    scales = {}
    if shape.condition is not None:
        scales["condition_standardizer"] = Standardizer.identity(shape.condition)
    scales["target_standardizer"] = Standardizer.identity(shape.target)
    if shape.words is not None:
        zeros = torch.zeros(1, shape.words.width)
        scales["words_standardizer"] = Standardizer(zeros, torch.ones_like(zeros))
    return scales


def standardised(
    condition: AnyCondition, grid: Standardizer | None, words: Standardizer | None
) -> AnyCondition:
    """Return a condition in fp32 and standardised, with zeros behind each caption.

    Args:
        condition: Raw tokens of a grid, or words with or without a grid.
        grid: Scale of the grid's tokens, where there are any.
        words: Scale of words, mean and std [1, E].
    """
    if not isinstance(condition, Condition):
        assert grid is not None
        return grid.standardise(condition)
    assert words is not None
    tokens_BLE = words.standardise(condition.words)
    tokens_BLE.masked_fill_(~condition.present[..., None], 0)
    grid_BMC = None
    if condition.grid is not None:
        assert grid is not None
        grid_BMC = grid.standardise(condition.grid)
    longest = tokens_BLE.shape[1]
    padding = (0, 0, 0, padded(longest) - longest)
    return Condition(grid_BMC, F.pad(tokens_BLE, padding), condition.length)
