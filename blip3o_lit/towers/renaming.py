"""Turning published tensor names and layouts into those of the module that runs them."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError

Rules = list[tuple[re.Pattern[str], str]]
QKV = re.compile(r"(.*)\{([qkv])\}(.*)")
"""A renamed tensor `...{q}...` is the query third of a fused `......`."""


def rules(table: dict[str, str]) -> Rules:
    """Compile a table of regular expressions and replacements."""
    return [(re.compile(pattern), replacement) for pattern, replacement in table.items()]


def new_name(name: str, table: Rules) -> str | None:
    """Return a published tensor's new name, or None where no rule matches the whole name."""
    for pattern, replacement in table:
        match = pattern.fullmatch(name)
        if match:
            return match.expand(replacement)
    return None


def rename(
    tensors: Iterable[tuple[str, Tensor]], table: Rules, dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Rename tensors, fuse query, key and value, and cast; holds one published tensor at a time.

    Args:
        tensors: Published names and tensors.
        table: Rules; a new name with `{q}`, `{k}` or `{v}` in it is a third of one fused tensor
            whose name lacks it. Unknown names keep theirs, so that loading names them.
        dtype: Number format of the result.
        device: Device of the result.

    Raises:
        UserError: If a fused tensor lacks one of its thirds.
    """
    named: dict[str, Tensor] = {}
    thirds: dict[str, set[str]] = {}
    for name, tensor in tensors:
        new = new_name(name, table) or name
        part = QKV.fullmatch(new)
        if part is None:
            named[new] = tensor.to(device=device, dtype=dtype)
            continue
        fused, letter, rows = part[1] + part[3], part[2], len(tensor)
        if fused not in named:
            shape = (3 * rows, *tensor.shape[1:])
            named[fused] = torch.empty(shape, dtype=dtype, device=device)
        first = "qkv".index(letter) * rows
        named[fused][first : first + rows] = tensor
        thirds.setdefault(fused, set()).add(letter)
    for fused, letters in thirds.items():
        if len(letters) < 3:
            missing = ", ".join(sorted(set("qkv") - letters))
            raise UserError(f"the weights lack {missing} of {fused}: not this architecture")
    return named
