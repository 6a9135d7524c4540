"""Conditions that hold words: the token states of captions, padded to the longest of a batch.

A condition that is a grid alone is a plain tensor [B, M, C] everywhere. Shape suffixes: B images,
M grid tokens of width C, L tokens of the batch's longest caption, E their width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError


@dataclass(frozen=True)
class Condition:
    """Words, and a grid beside them where a run has both; a row is an image."""

    grid: Tensor | None
    """[B, M, C]."""
    words: Tensor
    """[B, L, E], zeros behind each length."""
    length: Tensor
    """Words of each image, int64 [B]; 0: none."""

    @property
    def device(self) -> torch.device:
        return self.words.device

    @property
    def present(self) -> Tensor:
        """Where a word is, and no padding: bool [B, L], made on the device."""
        places_L = torch.arange(self.words.shape[1], device=self.device)
        return places_L < self.length[:, None]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: Tensor | slice) -> Condition:
        """Return some images; the padding stays."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Condition:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def float(self) -> Condition:
        """Return it with fp32 tokens."""
        grid = None if self.grid is None else self.grid.float()
        return Condition(grid, self.words.float(), self.length)

    def clone(self) -> Condition:
        return self._each(torch.clone)

    def pin_memory(self) -> Condition:
        return self._each(lambda tensor: tensor.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tell the allocator that `stream` uses the tensors."""
        for tensor in tensors_of(self):
            tensor.record_stream(stream)

    def check(self, shape: PairShape) -> None:
        """Refuse what is no raw condition of a shape; captions may be of any length.

        Raises:
            UserError: If sizes, types or lengths don't fit, or a number is not finite.
        """
        want, sizes = shape.words, list(self.words.shape)
        if want is None:
            raise UserError(f"the condition has words, and the model reads {shape.condition_text}")
        if len(sizes) != 3 or sizes[2] != want.width or not sizes[0]:
            raise UserError(f"words are {sizes}, expected [B, L, {want.width}]")
        whole = self.length.dtype == torch.int64 and list(self.length.shape) == sizes[:1]
        if not whole or not bool(((self.length >= 0) & (self.length <= sizes[1])).all()):
            raise UserError(f"lengths of words are int64 [{sizes[0]}], of 0 to {sizes[1]}")
        grid = None
        if shape.condition is not None:
            grid = [sizes[0], shape.condition.tokens, shape.condition.width]
        given = None if self.grid is None else list(self.grid.shape)
        if given != grid:
            raise UserError(f"the grid beside the words is {given}, expected {grid or 'none'}")
        words = self.words.masked_fill(~self.present[..., None], 0)
        for tokens in (words, self.grid):
            if tokens is not None and not bool(torch.isfinite(tokens).all()):
                raise UserError("condition tokens hold NaN or infinity")

    def dropped(self, drop_B: Tensor) -> Condition:
        """Return it without the condition of some images: their grid is zero, their length 0."""
        drop_B11 = drop_B.view(-1, 1, 1)
        grid = None if self.grid is None else self.grid.masked_fill(drop_B11, 0)
        words = self.words.masked_fill(drop_B11, 0)
        return Condition(grid, words, self.length.masked_fill(drop_B, 0))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Condition:
        grid = None if self.grid is None else change(self.grid)
        return Condition(grid, change(self.words), change(self.length))


AnyCondition = Tensor | Condition


def tensors_of(condition: AnyCondition) -> list[Tensor]:
    """Return the tensors that a condition consists of."""
    if isinstance(condition, Tensor):
        return [condition]
    return [x for x in (condition.grid, condition.words, condition.length) if x is not None]


def dropped(condition: AnyCondition, drop_B: Tensor | None = None) -> AnyCondition:
    """Return a standardised condition without that of some images, or of all (None).

    A grid is set to zero, its mean token; no word is left.
    """
    if isinstance(condition, Tensor):
        if drop_B is None:
            return torch.zeros_like(condition)
        return condition.masked_fill(drop_B.view(-1, 1, 1), 0)
    return condition.dropped(torch.ones_like(condition.length).bool() if drop_B is None else drop_B)


def empty_condition(
    shape: PairShape, images: int, dtype: torch.dtype = torch.float32
) -> AnyCondition:
    """Return a condition of a shape whose numbers mean nothing; captions have the most words."""
    grid = None
    if shape.condition is not None:
        grid = torch.empty(images, shape.condition.tokens, shape.condition.width, dtype=dtype)
    if shape.words is None:
        assert grid is not None
        return grid
    words = torch.empty(images, shape.words.longest, shape.words.width, dtype=dtype)
    return Condition(grid, words, torch.full((images,), shape.words.longest))
