"""From pictures to condition tokens, and from generated tokens to captions.

Shape suffixes: B pictures, N tokens, C or D token width, P embedding width, T captions.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.towers import PixelsConfig
from blip3o_lit.images.item import EXTENSIONS, Reject, decode, file_bytes
from blip3o_lit.images.pixels import VIEWER
from blip3o_lit.images.walk import below
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ArraySpec
from blip3o_lit.tokens.views import View, view_of
from blip3o_lit.towers.tower import Tower

_BATCH = 16
_CAPTIONS = 256


def picture_files(place: str | Path) -> list[Path]:
    """Return the picture that a path names, or those below a folder, sorted."""
    path = Path(place).expanduser()
    if not path.is_dir():
        return [path]
    files = [path / name for name in below(path).pictures]
    if not files:
        raise UserError(f"images={place} holds no .{', .'.join(EXTENSIONS)}")
    return files


def _open(picture: str | Path | Image.Image, pixels: PixelsConfig) -> Image.Image:
    try:
        content = picture if isinstance(picture, Image.Image) else file_bytes(Path(picture))
        return decode(content, pixels)
    except Reject as error:
        name = "the given picture" if isinstance(picture, Image.Image) else picture
        raise UserError(f"{name}: {error}") from error


@torch.no_grad()
def picture_tokens(
    tower: Tower,
    pictures: Sequence[str | Path | Image.Image],
    mode: ModeConfig,
    pixels: PixelsConfig = VIEWER,
) -> Tensor:
    """Return the tokens `[B, N, C]` (fp32) that a mode sees of pictures, files or PIL.

    `mode` is the view, as in training, `pixels` how they become pixels, as in the extraction.
    """
    view = _view(tower, mode)
    parts = []
    for start in range(0, len(pictures), _BATCH):
        batch = [tower.preprocess(_open(one, pixels)) for one in pictures[start : start + _BATCH]]
        tokens = tower.tokens(torch.stack(batch).to(tower.device)).float()[:, view.first :]
        parts.append(view.compute(tokens) if view.computes else tokens)
    return torch.cat(parts)


@torch.no_grad()
def embed_captions(tower: Tower, captions: Sequence[str]) -> Tensor:
    """Return the unit embeddings `[T, P]` (fp32) that a tower's text side gives captions."""
    parts = []
    for start in range(0, len(captions), _CAPTIONS):
        text_TP = tower.encode_text(list(captions[start : start + _CAPTIONS]))
        if text_TP is None:
            raise UserError(f"tower {tower.info.name} has no text side: choose towers with one")
        parts.append(F.normalize(text_TP.float(), dim=-1))
    return torch.cat(parts)


@torch.no_grad()
def rank_captions(
    tokens_BND: Tensor, shape: TokenShape, mode: ModeConfig, tower: Tower, text_TP: Tensor
) -> Tensor:
    """Return the cosine `[B, T]` between generated target tokens and captions.

    CLS through the target tower's head stands for the picture, or the mean of the projected
    patches where the mode has no CLS. Tokens are in the tower's own scale and in the view `mode`;
    `text_TP` is what `embed_captions` gives.
    """
    tokens_BND = tokens_BND.to(tower.device)
    chosen = tokens_BND[:, :1] if shape.cls else tokens_BND
    projected = chosen.float() if mode.projected else _head(tower)(chosen)
    return F.normalize(projected.mean(1), dim=-1) @ text_TP.T


def _head(tower: Tower) -> Head:
    """Return a tower's own final norm and projection."""
    tensors, metadata = tower.heads()
    if "projection" not in tensors:
        raise UserError(f"tower {tower.info.name} has no projection into the caption space")
    return Head(tensors, metadata, tower.info.normed).to(tower.device)


def _view(tower: Tower, mode: ModeConfig) -> View:
    info, shape = tower.info, tower.info.shape
    size = (shape.tokens, shape.width)
    spec = ArraySpec("tokens", "float32", size, cls=shape.cls, grid=shape.grid, normed=info.normed)
    return view_of(info.name, spec, mode, None, lambda _: _head(tower))
