"""A reader of drawn digits that is fitted on fewer scenes than the real one, for time's sake."""

from __future__ import annotations

from pathlib import Path

from blip3o_lit.drawing.digits import DigitReader, digit_reader


def small_reader(folder: Path) -> DigitReader:
    """Fit a reader on few scenes and keep it in `folder`, where the real one would lie."""
    return digit_reader(folder, scene_count=400, batch_size=64)
