"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from blip3o_lit.config.errors import UserError


def expanded(text: str) -> Path:
    """Return a path with `~` and `~user` replaced by the home folder.

    Where nobody has that name, a folder of the very name `~user` is meant, as in a shell.

    Raises:
        UserError: If there is neither.
    """
    path = Path(os.path.expanduser(text))
    first = Path(text).parts[:1]
    if not text.startswith("~") or str(path) != str(Path(text)):
        return path
    here = Path.cwd() / first[0]
    if here.exists():
        return Path.cwd() / text
    if first[0] == "~":
        raise UserError(f"{text}: no home folder is known: set HOME, or write the whole path")
    raise UserError(f"{text}: there is neither a user {first[0][1:]} nor a folder {first[0]} here")
