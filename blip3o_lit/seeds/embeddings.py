"""The seeds' embedding files as pairs of token arrays, whatever variant they are.

Shapes: n samples, C channels; CLS is the first of 257 tokens.

| variant | arrays of a side |
|---|---|
| single file | `<side>_grid_embeddings` [n, 16, 16, C] |
| single file, reduced or not | `<side>_blip3o_embeddings` [n, 64 or 256, C] |
| chunk | `<side>_blip3o_embeddings` [n, 256 or 257, C] |
| extraction or emergency checkpoint | the same keys + `_list`: a list of batches or of samples |
| COCO | `<side>_embeddings` [n, 64, 256 or 257, C] |
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.arrays import BFLOAT16, as_array, float_rows
from blip3o_lit.seeds.pickles import read_pickle

SIDES = ("eva", "clip")
FULL_KEYS = ("{}_grid_embeddings", "{}_grid_embeddings_list")
TOKEN_KEYS = ("{}_blip3o_embeddings", "{}_blip3o_embeddings_list", "{}_embeddings")
REDUCED = (8, 8)
GRIDS = {64: REDUCED, 256: (16, 16), 257: (16, 16)}
PROJECTED_WIDTHS = {"eva": 1280, "clip": 768}
"""Widths of EVA-CLIP-8B and CLIP ViT-L/14 after their projections (4096 and 1024 before)."""


class Side:
    """One tower's tokens of one file: one or several arrays, joined along their first side."""

    def __init__(self, parts: list[np.ndarray], shape: TokenShape) -> None:
        self.parts, self.shape = parts, shape
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def rows(self, first: int, last: int) -> np.ndarray:
        """Read samples `first` to `last` (excluded) as float32 `[n, N, C]`."""
        blocks = []
        while first < last:
            number = int(np.searchsorted(self.ends, first, "right"))
            part, end = self.parts[number], int(self.ends[number])
            start, stop = end - len(part), min(last, end)
            blocks.append(float_rows(part, first - start, stop - start))
            first = stop
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        return joined.reshape(len(joined), -1, self.shape.width)


class LegacyFile:
    """One embedding file, opened without reading its numbers."""

    def __init__(self, path: Path, mode: str = "auto") -> None:
        """Open and check a pickle, or what `torch.save` wrote.

        `mode` auto takes the fullest tokens, grid_64 the averaged ones; patch_only and cls_patch
        take full grids.
        """
        data = _load(path)
        if not isinstance(data, dict):
            raise UserError(f"{path} holds no dict of embeddings")
        self.path = path
        self.sides = {name: _side(data, name, mode, path) for name in SIDES}
        eva, clip = self.sides.values()
        if len(eva) != len(clip):
            raise UserError(f"{path} holds {len(eva)} eva and {len(clip)} clip rows")
        patches = {eva.shape.patches, clip.shape.patches}
        if len(patches) > 1:
            raise UserError(f"{path} pairs grids of {sorted(patches)} patches: not one task")
        self.samples = len(eva)
        self.captions = _texts(data, "captions", self.samples, path)
        self.keys = _texts(data, "keys", self.samples, path)
        config = data.get("config")
        self.config: dict[Any, Any] = config if isinstance(config, dict) else {}
        if self.config.get("cls_first") is False:
            raise UserError(f"{path} says cls_first=false: CLS is expected before the patches")

    @property
    def reduced(self) -> bool:
        return self.sides["eva"].shape.grid == REDUCED

    def tower(self, side: str) -> str:
        name = self.config.get(f"{side}_model", "")
        return name[:200] if isinstance(name, str) else ""

    def projected(self, side: str) -> bool:
        return self.reduced and self.sides[side].shape.width == PROJECTED_WIDTHS[side]


def _load(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if not zipped and path.suffix not in (".pt", ".pth"):
            return read_pickle(path)
        # With torch's own safe loader, mapped where it is a zip.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except UserError:
        raise
    except Exception as error:  # a stranger's file may break torch's parser in any way
        name = re.search(r"(?:GLOBAL|class|call to|type) ([\w.]+\.[\w.]+)", str(error))
        if name:
            raise UserError(f"{path} asks for {name[1]}: refused, nothing was run") from error
        raise UserError(f"{path} is no file of tensors that torch can load safely") from error


def _side(data: dict[Any, Any], side: str, mode: str, path: Path) -> Side:
    keys = TOKEN_KEYS if mode == "grid_64" else FULL_KEYS + TOKEN_KEYS
    names = [key.format(side) for key in keys]
    name = next((name for name in names if data.get(name) is not None), None)
    if name is None:
        held = ", ".join(str(key)[:40] for key in list(data)[:12])
        raise UserError(f"{path} has none of {', '.join(names)}; it holds {held}")
    where = f"{path}: {name}"
    parts = _parts(data[name], where)
    full = "grid" in name
    due = "[n, rows, columns, C] is due" if full else "[n, 64, 256 or 257, C] is due"
    sides = 4 if full else 3
    if isinstance(data[name], list) and parts[0].ndim == sides - 1:
        parts = [part[None] for part in parts]
    shape = parts[0].shape[1:]
    for part in parts:
        if part.ndim != sides or 0 in part.shape or part.shape[1:] != shape:
            raise UserError(f"{where} has the shape {list(part.shape)}: {due}")
        if part.dtype != BFLOAT16 and part.dtype.kind != "f":
            raise UserError(f"{where} holds {part.dtype} numbers: floats are due")
    if full:
        return Side(parts, TokenShape(shape[:2], False, shape[2]))
    tokens, width = shape
    if tokens not in GRIDS:
        raise UserError(f"{where} has {tokens} tokens per sample: {due}")
    grid = GRIDS[tokens]
    if mode == "grid_64" and grid != REDUCED:
        raise UserError(
            f"{where} has {tokens} tokens: convert with mode=auto, "
            "training with mode=grid_64 averages them itself"
        )
    return Side(parts, TokenShape(grid, tokens == 257, width))


def _parts(value: Any, where: str) -> list[np.ndarray]:
    """Return the arrays of a side: the value itself, or the items of a list."""
    parts = []
    for item in value if isinstance(value, list) else [value]:
        array = as_array(item)
        if array is None:
            raise UserError(f"{where} is a {type(item).__name__}, no array")
        parts.append(array)
    if not parts:
        raise UserError(f"{where} is an empty list, no array")
    return parts


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
