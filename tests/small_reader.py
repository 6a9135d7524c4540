"""A reader of drawn digits that is fitted on fewer scenes than the real one, for time's sake."""

from __future__ import annotations

from pathlib import Path

import pytest

from blip3o_lit.drawing import digits
from blip3o_lit.drawing.digits import DigitReader, digit_reader


def few_scenes(patch: pytest.MonkeyPatch) -> None:
    """Let readers be fitted on few scenes."""
    patch.setattr(digits, "SCENES", 400)
    patch.setattr(digits, "BATCH", 64)


def small_reader(folder: Path) -> DigitReader:
    with pytest.MonkeyPatch.context() as patch:
        few_scenes(patch)
        return digit_reader(folder)
