"""What draws tokens: the read-out of a training split, where it is kept, and what else can draw."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blip3o_lit.base.files import replacing
from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.readout import Readout, fitted_readout
from blip3o_lit.drawing.thumbnail import opened
from blip3o_lit.tokens.reading.order import evenly
from blip3o_lit.tokens.reading.reader import TokenReader

READOUT_FILE = "readout.safetensors"
"""In a run directory and in an export."""
IMAGES = 128
"""Training images that a read-out is fitted on, at most."""
_BATCH = 16


class Drawer(Protocol):
    """A read-out or a pretrained decoder."""

    def draw(self, tokens_BNC: Tensor) -> Tensor:
        """Return pictures `[B, 3, H, W]` in 0..1 of raw target tokens."""
        ...


def split_readout(train: TokenReader, folder: Path) -> Readout:
    """Return the read-out of a training split, fitted on images evenly spaced over it.

    `train` is that split and no other, of a store with thumbnails; `folder` keeps what is fitted.
    """
    ids = evenly(len(train), IMAGES)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(ids), _BATCH):
            part = ids[start : start + _BATCH]
            yield train.read(part)["target"], thumbnails(train, part)

    content = hashlib.sha256(json.dumps([train.content_hash, IMAGES]).encode()).hexdigest()
    return fitted_readout(content, train.shape.target, batches, folder)


def thumbnails(reader: TokenReader, ids: np.ndarray) -> Tensor:
    """Return the thumbnails of samples as pictures `[B, 3, H, W]` in 0..1."""
    return opened(reader.thumbnails(ids), reader.keys(ids))


def save_readout(readout: Readout, folder: Path) -> None:
    """Keep a read-out beside the weights of the translator whose tokens it draws."""
    with replacing(folder / READOUT_FILE) as temporary:
        save_file(readout.state_dict(), temporary)


def kept_readout(folder: Path, shape: TokenShape) -> Readout | None:
    """Return the read-out that a run directory or an export holds, or None."""
    file = folder / READOUT_FILE
    if not file.is_file():
        return None
    readout = Readout(shape)
    try:
        readout.load_state_dict(load_file(file))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"{file} is damaged or of other tokens ({reason}): delete it, evaluate writes it again"
        ) from error
    return readout.eval()
