"""Single images of an evaluation: the worst 1 %, and best, median and worst with their pictures.

Shape suffixes: B images, P embedding width.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchmetrics.utilities import dim_zero_cat

from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.sheet import data_url
from blip3o_lit.images.item import Reject, decode, file_bytes
from blip3o_lit.metrics.retrieval import NO_CAPTION, Retrieval
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.towers.scenes import scene_of

WORST_SHARE, WORST_MOST = 0.01, 20
EXAMPLES = 4
"""Images of each kind."""
SIDE = 128
"""Longest side of a picture in the report, in pixels."""
_SCENE = "scene:"
_CHUNK = 1024


def worst(held: TokenReader, cosine_B: np.ndarray) -> list[dict[str, Any]]:
    """Return the 1 % of images with the lowest cosine, worst first."""
    count = min(WORST_MOST, max(1, round(WORST_SHARE * len(cosine_B))))
    return _rows(held, cosine_B, np.argsort(cosine_B, kind="stable")[:count])


def examples(
    held: TokenReader,
    cosine_B: np.ndarray,
    recall: dict[str, Retrieval],
    pictures: str | None,
) -> dict[str, list[dict[str, Any]]]:
    """Return the best, median and worst images, with pictures and retrieved captions.

    `recall` has the embeddings of the `generated` and the `true` tokens, or nothing. `pictures` is
    the folder that sources of images are below; demo scenes are drawn anew.
    """
    if pictures is not None and not Path(pictures).expanduser().is_dir():
        raise UserError(f"pictures={pictures} is no folder: name the one that images= named")
    nearest = {
        source: _nearest_captions(embeddings)
        for source, embeddings in recall.items()
        if embeddings.captioned
    }
    groups = {}
    for name, ids in ranked(cosine_B, EXAMPLES).items():
        groups[name] = _rows(held, cosine_B, ids)
        for row, number in zip(groups[name], ids.tolist()):
            for source, nearest_B in nearest.items():
                row[f"caption_{source}"] = held.captions(nearest_B[[number]])[0]
            picture = _picture(row["source"], pictures)
            if picture is not None:
                row["picture"] = data_url(picture)
    return groups


def ranked(cosine_B: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return the numbers of so many best, median and worst images."""
    order = np.argsort(cosine_B, kind="stable")
    count = min(count, len(order))
    middle = (len(order) - count) // 2
    return {
        "best": order[::-1][:count],
        "median": order[middle : middle + count],
        "worst": order[:count],
    }


def _rows(held: TokenReader, cosine_B: np.ndarray, ids: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for key, item, cosine in zip(held.keys(ids), held.metadata(ids), cosine_B[ids].tolist()):
        texts = {name: str(item.get(name, "")) for name in ("caption", "source")}
        rows.append({"key": key, "cosine": cosine, **texts})
    return rows


def _nearest_captions(recall: Retrieval) -> np.ndarray:
    """Return, for each image, the number of the image whose caption is nearest `[B]`."""
    image_BP, text_BP = dim_zero_cat(recall.image), dim_zero_cat(recall.text)
    blank_B = dim_zero_cat(recall.caption) == NO_CAPTION
    nearest = [
        (part @ text_BP.T).masked_fill(blank_B, -torch.inf).argmax(1)
        for part in image_BP.split(_CHUNK)
    ]
    return torch.cat(nearest).cpu().numpy()


def _picture(source: str, folder: str | None) -> Image.Image | None:
    if source.startswith(_SCENE):
        image = scene_of(source.removeprefix(_SCENE)).image
        return image.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    if folder is None or not source:
        return None
    root = Path(folder).expanduser().resolve()
    path = (root / source).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        return None
    try:
        image = decode(file_bytes(path))
    except Reject:  # the picture changed since its tokens were made; its numbers still stand
        return None
    image.thumbnail((SIDE, SIDE))
    return image
