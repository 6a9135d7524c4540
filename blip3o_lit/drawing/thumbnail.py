"""A picture's thumbnail: what the target tower sees of it, as a small JPEG, and back.

Shape suffixes: B pictures, S side of the tower's input, H and W pixels of a thumbnail.
"""

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.towers.tower import TowerInfo

SIDE = 4
"""Most pixels per patch side; fewer where the tower's own patches have fewer."""
BYTES = 2048
"""What a thumbnail may weigh: the best quality that fits is taken."""
QUALITIES = (95, 90, 85, 80, 70, 60, 50, 40)


def thumbnail(pixels_3SS: Tensor, info: TowerInfo) -> bytes:
    """Return the JPEG of one input of a tower, as `Tower.preprocess` gives it."""
    facts = info.preprocessing
    mean, std = (
        torch.tensor(facts.get(key) or [neutral] * 3).view(3, 1, 1)
        for key, neutral in (("mean", 0.0), ("std", 1.0))
    )
    levels = ((pixels_3SS.float() * std + mean) * 255).round().clamp(0, 255)
    picture = Image.fromarray(levels.byte().permute(1, 2, 0).numpy())
    rows, columns = info.shape.grid
    size = (
        min(columns * SIDE, picture.width),
        min(rows * SIDE, picture.height),
    )
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BOX)
    for quality in QUALITIES:
        content = _jpeg(picture, quality)
        if len(content) <= BYTES:
            break
    return content


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    out = io.BytesIO()
    # Colours at full resolution: at this size half of it would blur them over a whole patch.
    picture.save(out, "JPEG", quality=quality, subsampling=0, optimize=True)
    return out.getvalue()


def opened(thumbnails: Sequence[bytes], keys: Sequence[str]) -> Tensor:
    """Return thumbnails as pictures `[B, 3, H, W]` in 0..1; a damaged one is named by its key."""
    pictures = []
    for content, key in zip(thumbnails, keys, strict=True):
        try:
            pictures.append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise UserError(f"sample {key}: its thumbnail is damaged: extract it again") from error
    levels_BHW3 = torch.from_numpy(np.stack(pictures))
    return levels_BHW3.permute(0, 3, 1, 2).float() / 255
