"""Number formats of stored tokens: fp16, bf16, fp32, and int8 with scales (`int8.py`)."""

from __future__ import annotations

import numpy as np
import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import STORED, ArraySpec
from blip3o_lit.tokens.store.int8 import quantise, scale_array
from blip3o_lit.tokens.store.sequences import check_sequence

LARGEST = 6e4
"""Magnitudes from here on are refused: fp16 ends at 65504."""
TORCH_TYPES = {name: getattr(torch, name) for name in STORED}


def finite(stored: np.ndarray, dtype: str) -> bool:
    """Return whether all stored numbers are finite.

    The 16-bit floats are compared as integers, which is much faster: NaN and infinity are the
    largest of either sign.
    """
    if dtype in ("int8", "int32") or not stored.size:
        return True
    if dtype == "float32":
        return bool(np.isfinite(stored).all())
    limit = 0x7C00 if dtype == "float16" else 0x7F80
    top, bottom = stored.view(np.int16).max(), stored.view(np.uint16).max()
    return bool(top < limit and bottom < limit + 0x8000)


def encode(
    arrays: dict[str, np.ndarray],
    specs: dict[str, ArraySpec],
    scales: dict[str, np.ndarray],
    key: str,
) -> dict[str, np.ndarray]:
    """Convert a sample's arrays to what is stored, in the index's order, token scales included.

    `scales` are the channel scales `[N, C]` of int8 arrays; `key` is the sample, for messages.
    """
    names = {name for name, spec in specs.items() if spec.kind != "scale"}
    if arrays.keys() != names:
        raise UserError(f"sample {key} has {sorted(arrays)}, the store {sorted(names)}")
    out: dict[str, np.ndarray] = dict.fromkeys(specs, np.empty(0))
    for name, value in arrays.items():
        spec = specs[name]
        if spec.kind == "sequence":
            check_sequence(name, value, arrays, specs, key)
        elif value.shape != spec.shape:
            raise UserError(
                f"sample {key}: {name} has shape {list(value.shape)}, "
                f"the store holds {list(spec.shape)}"
            )
        _check_numbers(value, key, name)
        if spec.dtype == "int8":
            out[name], token_N = quantise(value, scales[name], spec.scale == "token")
            if token_N is not None:
                out[scale_array(name)] = token_N
        elif spec.dtype == "bfloat16":
            tensor = torch.from_numpy(np.array(value, "<f4")).bfloat16()
            out[name] = tensor.view(torch.int16).numpy()
        else:
            out[name] = np.ascontiguousarray(value, spec.stored)
    return out


def _check_numbers(value: np.ndarray, key: str, name: str) -> None:
    largest = np.abs(value.astype(np.float32, copy=False)).max(initial=0.0)
    if not largest < LARGEST:
        raise UserError(
            f"sample {key}: {name} holds {'NaN' if np.isnan(largest) else f'{largest:g}'}; "
            f"finite values below {LARGEST:g} fit, so store normed tokens or drop the image"
        )
