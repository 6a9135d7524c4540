"""Arrays of the seeds' pickles as descriptions: where their numbers lie, read a few rows at a time.

Nothing here calls NumPy's or torch's own rebuilding functions with what a file says; every size,
stride and type is checked against the bytes that exist first.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from blip3o_lit.config.errors import UserError

MAX_SIDES = 8


def take(arguments: tuple[Any, ...], *types: type) -> tuple[Any, ...]:
    """Return `arguments` if they have exactly these types, else raise TypeError."""
    found = tuple(type(item) for item in arguments)
    if found != types:
        raise TypeError(f"{[kind.__name__ for kind in found]} where other types are due")
    return arguments


@dataclass(frozen=True)
class Span:
    """Bytes inside a file that have not been read."""

    file: BinaryIO
    start: int
    size: int
    where: str

    def read(self, first: int, last: int) -> bytes:
        """Return the bytes `first` to `last` (excluded) of the span.

        Raises:
            UserError: If the file has become shorter.
        """
        self.file.seek(self.start + first)
        data = self.file.read(last - first)
        if len(data) != last - first:
            raise UserError(f"{self.where} became shorter while it was read: copy it again")
        return data


@dataclass
class Storage:
    """The flat numbers behind a tensor."""

    dtype: str
    """NumPy's name of the type, or bfloat16."""
    count: int
    data: Span | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class StoredArray:
    """An array inside a file; offset and strides count numbers, not bytes."""

    data: Span
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that the bytes can't hold; nothing is allocated before."""
        sides = (*self.shape, *self.strides, self.offset)
        if any(type(side) is not int or side < 0 for side in sides):
            raise TypeError("sizes and strides must be whole numbers from 0 on")
        if len(self.shape) != len(self.strides) or len(self.shape) > MAX_SIDES:
            raise ValueError("sizes and strides disagree")
        reach = self.offset + self._extent(self.shape)
        if max(reach, math.prod(self.shape)) * self.itemsize > self.data.size:
            raise UserError(
                f"{self.data.where}: an array claims the shape {list(self.shape)}, but its bytes "
                f"hold {self.data.size // self.itemsize} numbers: copy the file again"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize

    @property
    def is_float(self) -> bool:
        """Whether the numbers are floating-point ones."""
        return self.dtype == "bfloat16" or np.dtype(self.dtype).kind == "f"

    def _extent(self, shape: tuple[int, ...]) -> int:
        """Numbers from the first to the last of a block of this shape, both included."""
        if 0 in shape:
            return 0
        return 1 + sum((side - 1) * stride for side, stride in zip(shape, self.strides))

    def batched(self) -> StoredArray:
        """Return the same array with a leading side of 1."""
        return StoredArray(self.data, self.dtype, (1, *self.shape), (0, *self.strides), self.offset)

    def rows(self, first: int, last: int) -> np.ndarray:
        """Read rows `first` to `last` (excluded) as float32; only their bytes are touched."""
        shape = (last - first, *self.shape[1:])
        start = self.offset + first * self.strides[0]
        stop = start + self._extent(shape)
        raw = self.data.read(start * self.itemsize, stop * self.itemsize)
        flat = np.frombuffer(raw, "<u2" if self.dtype == "bfloat16" else self.dtype)
        steps = [stride * self.itemsize for stride in self.strides]
        block = np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)
        if self.dtype == "bfloat16":
            return (block.astype("<u4") << np.uint32(16)).view("<f4")
        with np.errstate(over="ignore"):
            return block.astype(np.float32)


class DtypeState:
    """A NumPy dtype in the making: plain numbers only."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        """Take the arguments of `numpy.dtype`, such as ('f4', False, True)."""
        code = arguments[0]
        if type(code) is not str or not re.fullmatch(r"[biuf][1248]", code):
            shown = str(code)[:20].encode("ascii", "backslashreplace").decode()
            raise TypeError(f"arrays of type {shown}")
        self.code, self.order = code, "<"

    def set(self, state: tuple[Any, ...]) -> None:
        """Take the byte order from the pickled state."""
        order = state[1]
        if order not in ("<", ">", "|") or any(part is not None for part in state[2:5]):
            raise TypeError("an array of records")
        self.order = order

    @property
    def name(self) -> str:
        """NumPy's name of the type."""
        return np.dtype(f"{self.order}{self.code}").str


class ArrayState:
    """A NumPy array in the making; `finish` gives the description once its state has come."""

    def __init__(self) -> None:
        """Start without state."""
        self.array: StoredArray | None = None

    def set(self, state: tuple[Any, ...]) -> None:
        """Take (version, shape, dtype, Fortran order, bytes)."""
        _, shape, dtype, fortran, data = take(state, int, tuple, DtypeState, bool, Span)
        self.array = contiguous(data, dtype, shape, "F" if fortran else "C")


def contiguous(data: Span, dtype: DtypeState, shape: tuple[Any, ...], order: str) -> StoredArray:
    """Describe an array whose numbers lie without gaps, in C or Fortran order."""
    if any(type(side) is not int for side in shape) or len(shape) > MAX_SIDES:
        raise TypeError("sizes must be whole numbers")
    strides = [1] * len(shape)
    axes = range(len(shape) - 1) if order == "F" else range(len(shape) - 1, 0, -1)
    for axis in axes:
        after = axis + 1 if order == "F" else axis - 1
        strides[after] = strides[axis] * shape[axis]
    return StoredArray(data, dtype.name, shape, tuple(strides))


def frombuffer_array(arguments: tuple[Any, ...]) -> StoredArray:
    """Describe what NumPy's `_frombuffer(bytes, dtype, shape, order, axes)` would make."""
    data, dtype, shape, order = take(arguments[:4], Span, DtypeState, tuple, str)
    if order in ("C", "F"):
        return contiguous(data, dtype, shape, order)
    axes = arguments[4]
    if order != "K" or type(axes) is not tuple or sorted(axes) != list(range(len(shape))):
        raise ValueError(f"array order {order[:4]}")
    plain = contiguous(data, dtype, shape, "C")
    sides = tuple(plain.shape[axis] for axis in axes)
    return StoredArray(data, plain.dtype, sides, tuple(plain.strides[axis] for axis in axes))


def tensor(arguments: tuple[Any, ...]) -> StoredArray:
    """Describe what torch's `_rebuild_tensor_v2` would make."""
    storage, offset, size, stride, _, _ = take(
        arguments[:6], Storage, int, tuple, tuple, bool, dict
    )
    if storage.data is None:
        raise ValueError("a tensor without numbers")
    return StoredArray(storage.data, storage.dtype, size, stride, offset)
