"""The seeds' embedding files as pairs of token arrays, whatever variant they are.

Shape suffixes: b rows, N tokens (CLS first where there is one), C width.

| variant | arrays of a side |
|---|---|
| single file | `<side>_grid_embeddings` [n, 16, 16, C] |
| single file, reduced or not | `<side>_blip3o_embeddings` [n, 64 or 256, C] |
| chunk | `<side>_blip3o_embeddings` [n, 256 or 257, C] |
| extraction or emergency checkpoint | the same keys + `_list`: a list of batches or of samples |
| COCO | `<side>_embeddings` [n, 64, 256 or 257, C] |
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.arrays import ArrayState, float_rows, is_array, is_float
from blip3o_lit.seeds.pickles import read_pickle

SIDES = ("eva", "clip")
FULL_KEYS = ("{}_grid_embeddings", "{}_grid_embeddings_list")
TOKEN_KEYS = ("{}_blip3o_embeddings", "{}_blip3o_embeddings_list", "{}_embeddings")
GRIDS = {64: (8, 8), 256: (16, 16), 257: (16, 16)}
REDUCED_TOKENS = 64
PROJECTED_WIDTHS = {"eva": 1280, "clip": 768}
"""Widths of EVA-CLIP-8B and CLIP ViT-L/14 after their projections (4096 and 1024 before)."""


class Side:
    """One tower's tokens of one file: one or several arrays, read as `[b, N, C]`."""

    def __init__(self, name: str, parts: list[Any], shape: TokenShape) -> None:
        """Join `parts`, arrays or torch tensors, along their first side."""
        self.name, self.parts, self.shape = name, parts, shape
        self.ends = np.cumsum([part.shape[0] for part in parts])

    def __len__(self) -> int:
        """Samples."""
        return int(self.ends[-1])

    def rows(self, first: int, last: int) -> np.ndarray:
        """Read samples `first` to `last` (excluded) as float32 `[b, N, C]`."""
        blocks = []
        while first < last:
            number = int(np.searchsorted(self.ends, first, "right"))
            part, end = self.parts[number], int(self.ends[number])
            start = end - part.shape[0]
            stop = min(last, end)
            blocks.append(float_rows(part, first - start, stop - start))
            first = stop
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined.reshape(len(joined), -1, self.shape.width)


class LegacyFile(AbstractContextManager["LegacyFile"]):
    """One embedding file, opened without reading its numbers."""

    def __init__(self, path: Path, mode: str = "auto") -> None:
        """Open and check a file.

        Args:
            path: A pickle, or what `torch.save` wrote.
            mode: auto takes the fullest tokens, grid_64 the averaged ones; patch_only and cls_patch
                take full grids.

        Raises:
            UserError: If it is unsafe, damaged, or no embedding file.
        """
        self.path = path
        try:
            with open(path, "rb") as file:
                zipped = file.read(4) == b"PK\x03\x04"
            of_torch = zipped or path.suffix in (".pt", ".pth")
            data = _torch_load(path, zipped) if of_torch else read_pickle(path)
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}") from error
        if not isinstance(data, dict):
            raise UserError(f"{path} holds no dict of embeddings")
        self.sides = {side: _side(data, side, mode, self.path) for side in SIDES}
        counts = {name: len(side) for name, side in self.sides.items()}
        if len(set(counts.values())) > 1:
            raise UserError(f"{self.path} holds {counts['eva']} eva and {counts['clip']} clip rows")
        patches = {side.shape.patches for side in self.sides.values()}
        if len(patches) > 1:
            raise UserError(f"{self.path} pairs grids of {sorted(patches)} patches: not one task")
        self.samples = counts["eva"]
        self.captions = _texts(data, "captions", self.samples, self.path)
        self.keys = _texts(data, "keys", self.samples, self.path)
        config = data.get("config")
        self.config: dict[Any, Any] = config if isinstance(config, dict) else {}
        if self.config.get("cls_first") is False:
            raise UserError(f"{self.path} says cls_first=false: CLS is expected before the patches")
        self.source = str(data.get("source_tar", ""))[:1000]

    @property
    def reduced(self) -> bool:
        """Whether its tokens are the 64 averages of 2x2 patches."""
        return self.sides["eva"].shape.grid == GRIDS[REDUCED_TOKENS]

    def tower(self, side: str) -> str:
        """Return the encoder's name as the file gives it."""
        name = self.config.get(f"{side}_model", "")
        return name[:200] if isinstance(name, str) else ""

    def projected(self, side: str) -> bool:
        """Whether the width shows that the tower's projection is in the tokens."""
        return self.reduced and self.sides[side].shape.width == PROJECTED_WIDTHS[side]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let go of the arrays, and of the file that they map."""
        self.sides.clear()


def _torch_load(path: Path, zipped: bool) -> Any:
    """Load what `torch.save` wrote, mapped where it is a zip, with torch's own safe loader."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a stranger's file may break torch's parser in any way
        found = re.search(r"(?:GLOBAL|class|call to|type) ([\w.]+\.[\w.]+)", str(error))
        if found:
            raise UserError(f"{path} asks for {found[1]}: refused, nothing was run") from error
        raise UserError(f"{path} is no file of tensors that torch can load safely") from error


def _side(data: dict[Any, Any], side: str, mode: str, path: Path) -> Side:
    """Find and check the arrays of one side."""
    groups = {"auto": FULL_KEYS + TOKEN_KEYS, "grid_64": TOKEN_KEYS}
    names = [key.format(side) for key in groups.get(mode, FULL_KEYS + TOKEN_KEYS)]
    present = [name for name in names if name in data and data[name] is not None]
    if not present:
        held = ", ".join(str(key)[:40] for key in list(data)[:12])
        raise UserError(f"{path} has none of {', '.join(names)}; it holds {held}")
    name = present[0]
    value = data[name]
    items = value if isinstance(value, list) else [value]
    parts: list[Any] = [item.array if isinstance(item, ArrayState) else item for item in items]
    sides = 4 if "grid" in name else 3
    where = f"{path}: {name}"
    others = [type(part).__name__ for part in parts if not is_array(part)]
    if others or not parts:
        raise UserError(f"{where} is a {others[0] if others else 'empty list'}, no array")
    if isinstance(value, list) and len(parts[0].shape) == sides - 1:
        parts = [part[None] for part in parts]
    for part in parts:
        if len(part.shape) != sides or 0 in part.shape or part.shape[1:] != parts[0].shape[1:]:
            raise UserError(f"{where} has the shape {list(part.shape)}: {_due(sides)}")
        if not is_float(part):
            raise UserError(f"{where} holds {part.dtype} numbers: floats are due")
    shape = parts[0].shape[1:]
    if sides == 4:
        return Side(side, parts, TokenShape((shape[0], shape[1]), False, shape[2]))
    if shape[0] not in GRIDS:
        raise UserError(f"{where} has {shape[0]} tokens a sample: {_due(3)}")
    cls = shape[0] == 257
    if mode == "grid_64" and shape[0] != REDUCED_TOKENS:
        raise UserError(
            f"{where} has {shape[0]} tokens: convert with mode=auto, "
            "training with mode=grid_64 averages them itself"
        )
    return Side(side, parts, TokenShape(GRIDS[shape[0]], cls, shape[1]))


def _due(sides: int) -> str:
    return "[n, rows, columns, C] is due" if sides == 4 else "[n, 64, 256 or 257, C] is due"


def _texts(data: dict[Any, Any], name: str, samples: int, path: Path) -> list[str | None]:
    """Return captions or keys, None where the file has none."""
    values = data.get(name)
    if values is None or (isinstance(values, list) and not values):
        return [None] * samples
    if not isinstance(values, list | tuple) or len(values) != samples:
        count = len(values) if isinstance(values, list | tuple) else type(values).__name__
        raise UserError(f"{path} has {samples} samples, but {name}: {count}")
    for value in values:
        if value is not None and type(value) is not str:
            raise UserError(f"{path}: {name} holds a {type(value).__name__}, not text")
    return list(values)
