"""Modules that are fitted once and kept in a file: baselines, read-outs, the reader of digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from blip3o_lit.base.files import replacing
from blip3o_lit.config.errors import UserError


def load_or_fit(module: nn.Module, file: Path, fit: Callable[[], None]) -> None:
    """Give a module the state that `file` holds; where there is none, `fit` it and keep that.

    Raises:
        UserError: If the file is damaged.
    """
    if not file.is_file():
        fit()
        state = {name: value.contiguous().cpu() for name, value in module.state_dict().items()}
        with replacing(file) as temporary:
            save_file(state, temporary)
        return
    try:
        module.load_state_dict(load_file(file))
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: delete it, it is computed again") from error
