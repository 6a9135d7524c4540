"""Arrays of the seeds' pickles as views of a mapped file: nothing is copied before it is read.

NumPy's and torch's own rebuilding functions are not called with what a file says; every size,
stride and type is checked against the bytes that exist first.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BFLOAT16 = np.dtype([("bfloat16", "<u2")])
"""Marks the one type here that NumPy has no name for."""


def take(arguments: Any, *types: type) -> Any:
    """Return `arguments` if they are a tuple of exactly these types, else raise TypeError."""
    actual = tuple(type(item) for item in arguments)
    if type(arguments) is not tuple or actual != types:
        raise TypeError(f"{[kind.__name__ for kind in actual][:9]} where other types are due")
    return arguments


def take_sizes(sizes: Any) -> tuple[int, ...]:
    """Return a shape or strides if they are whole numbers from 0 on."""
    take(sizes, *[int] * len(sizes))
    if any(size < 0 for size in sizes):
        raise ValueError("a size or stride below 0")
    return sizes


@dataclass
class Storage:
    """The flat numbers behind a tensor."""

    dtype: np.dtype
    count: int
    data: memoryview = memoryview(b"")


class DtypeState:
    """A NumPy dtype in the making: plain numbers only."""

    def __init__(self, code: Any) -> None:
        if type(code) is not str or not re.fullmatch(r"[biuf][1248]", code):
            raise TypeError(f"arrays of type {str(code)[:20]}")
        self.dtype = np.dtype(code)

    def set(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|") or any(part is not None for part in state[2:5]):
            raise TypeError("an array of records")
        self.dtype = self.dtype.newbyteorder(order)


class ArrayState:
    """A NumPy array in the making: None until its state has come."""

    array: np.ndarray | None = None

    def set(self, state: Any) -> None:
        _, shape, dtype, fortran, data = take(state, int, tuple, DtypeState, bool, memoryview)
        self.array = view(data, dtype, shape, "F" if fortran else "C")


def view(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> np.ndarray:
    """Return an array whose numbers lie without gaps, as NumPy's `_frombuffer` would."""
    take((data, dtype, order), memoryview, DtypeState, str)
    flat = np.frombuffer(data, dtype.dtype)
    if order == "K":
        return flat.reshape(take_sizes(shape)).transpose(take_sizes(axes))
    return flat.reshape(take_sizes(shape), order="F" if order == "F" else "C")


def tensor(storage: Any, offset: Any, size: Any, stride: Any, *more: Any) -> np.ndarray:
    """Return what torch's `_rebuild_tensor_v2` would; offset and strides count numbers."""
    take((storage, offset, *more[:2]), Storage, int, bool, dict)
    take_sizes((offset, *take_sizes(size), *take_sizes(stride)))
    bytes_each = storage.dtype.itemsize
    steps = [step * bytes_each for step in stride]
    # NumPy checks this again, but in 64 bits, which a file could make overflow.
    last = offset + sum((side - 1) * step for side, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.count or (0 not in size and last >= storage.count):
        raise ValueError(f"{storage.count} numbers for a tensor of the shape {list(size)[:9]}")
    return np.ndarray(size, storage.dtype, storage.data, offset * bytes_each, steps)


def as_array(value: Any) -> np.ndarray | None:
    """Return an array or torch tensor as an array on the same bytes; None for anything else."""
    if isinstance(value, ArrayState):
        return value.array
    if isinstance(value, torch.Tensor):
        plain = value.detach()
        try:
            if plain.dtype == torch.bfloat16:
                return plain.view(torch.int16).numpy().view(BFLOAT16)
            return plain.numpy()
        except (TypeError, RuntimeError):  # sparse, quantised or without numbers
            return None
    return value if isinstance(value, np.ndarray) else None


def float_rows(array: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return rows `first` to `last` (excluded) as float32."""
    block = array[first:last]
    if block.dtype == BFLOAT16:
        # Its 16 bits are the upper half of a float32.
        return (block["bfloat16"].astype("<u4") << np.uint32(16)).view("<f4")
    with np.errstate(over="ignore"):
        return block.astype(np.float32)
