"""Modes are views of stored tokens: which rows are taken, projected and averaged.

Shape suffixes: B samples, N tokens of the view, C stored width, D width of the view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ArraySpec

GRID_64 = (8, 8)
"""The seeds' reduced grid."""
CHUNK = 16
"""Samples projected at a time, to spare memory."""


@dataclass(frozen=True)
class View:
    """What one mode makes of one array."""

    shape: TokenShape
    """Grid, CLS and width that come out."""
    first: int
    """First stored row that is taken: 1 skips a CLS token."""
    pool: tuple[int, int]
    """Rows and columns averaged into one token; (1, 1) averages nothing."""
    head: Head | None
    """Norm and projection, before averaging."""

    @property
    def computes(self) -> bool:
        """Whether anything but copying is needed; the result is fp32 then."""
        return self.head is not None or self.pool != (1, 1)

    @torch.no_grad()
    def compute(self, tokens_BNC: Tensor) -> Tensor:
        """Project and average the taken rows; returns `[B, N, D]` in fp32."""
        parts = []
        for chunk in tokens_BNC.split(CHUNK):
            tokens = chunk.float() if self.head is None else self.head(chunk)
            parts.append(average(tokens, self.shape.grid, self.pool))
        return torch.cat(parts)


def average(tokens_BNC: Tensor, grid: tuple[int, int], pool: tuple[int, int]) -> Tensor:
    """Average blocks of `pool` neighbours of a row-major grid without CLS; `grid` comes out."""
    if pool == (1, 1):
        return tokens_BNC
    batch, _, width = tokens_BNC.shape
    blocks = tokens_BNC.view(batch, grid[0], pool[0], grid[1], pool[1], width)
    return blocks.mean(dim=(2, 4)).view(batch, grid[0] * grid[1], width)


def sides_of(
    names: Sequence[str], arrays: Mapping[str, ArraySpec]
) -> tuple[str | None, str | None]:
    """Return which of a condition's arrays is its grid and which its sequence (words)."""
    found: dict[str, str] = {}
    kinds = ("tokens", "sequence")
    for name in names:
        kind = arrays[name].kind if name in arrays else ""
        if kind not in kinds:
            one_of("data.condition", name, [n for n, spec in arrays.items() if spec.kind in kinds])
        if kind in found:
            what = "grids" if kind == "tokens" else "sequences"
            raise UserError(
                f"data.condition: {found[kind]} and {name} are both {what}; it takes one grid and "
                "one sequence at most: leave one out"
            )
        found[kind] = name
    return found.get("tokens"), found.get("sequence")


def target_or_other(
    target: str, condition: str | Sequence[str], arrays: Mapping[str, ArraySpec]
) -> str:
    """Return the target's array or, of a store without it, another grid, which nobody looks at."""
    if target in arrays:
        return target
    grids = [name for name, spec in arrays.items() if spec.kind == "tokens"]
    grid = sides_of(names_of(condition), arrays)[0]
    if not grids:
        raise UserError(
            f"the store has words alone and no array {target}: extract its pictures too"
        )
    return grid or grids[0]


def view_of(
    array: str,
    spec: ArraySpec,
    mode: ModeConfig,
    reduced: str | None,
    load_head: Callable[[str], Head],
) -> View:
    """Return the view that `mode` has of an array; `reduced` is that of the index.

    `load_head` is called with the array's name when a projection is needed.
    """
    if spec.kind != "tokens":
        raise UserError(f"array {array} holds {spec.kind}, no tokens: choose another array")
    if reduced and mode.name != reduced:
        raise UserError(
            f"mode={mode.name} needs a full store; this one keeps {spec.shape[0]} averaged "
            f"{array} tokens: use mode={reduced} or extract again"
        )
    if mode.name == "cls_patch" and not spec.cls:
        raise UserError(
            f"mode=cls_patch needs a CLS token, which array {array} lacks: use mode=patch_only"
        )
    head = None
    # A reduced store has one view: its tokens as they are.
    if not reduced and mode.projected != spec.projected:
        if spec.projected:
            raise UserError(
                f"{array} tokens are stored projected, so mode.projected=false has nothing to "
                "read: set mode.projected=true"
            )
        head = load_head(array)
    width = head.width if head else spec.shape[1]
    keeps_cls = mode.name == "cls_patch"
    grid, pool = spec.grid, (1, 1)
    if mode.name == "grid_64":
        rows, columns = spec.grid
        if rows % GRID_64[0] or columns % GRID_64[1]:
            raise UserError(
                f"mode=grid_64 averages to 8x8, which {array}'s {rows}x{columns} grid does not "
                "divide into: use mode=patch_only"
            )
        grid, pool = GRID_64, (rows // GRID_64[0], columns // GRID_64[1])
    return View(TokenShape(grid, keeps_cls, width), int(spec.cls and not keeps_cls), pool, head)
