"""Where the project keeps what it builds for itself: demo tokens, statistics, fitted baselines."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """Return the cache folder: `BLIP3O_HOME`, else `blip3o_lit` in the user's cache folder."""
    given = os.environ.get("BLIP3O_HOME")
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "blip3o_lit"
