"""A small token store of random numbers, for tests of everything that reads one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from blip3o_lit.tokens.store.int8 import fit_int8
from blip3o_lit.tokens.store.shards import ArraySpec, TokenIndex, TokenWriter

EVA = ArraySpec("tokens", "float16", (17, 6), cls=True, grid=(4, 4), tower="eva-test")
CLIP = ArraySpec("tokens", "float16", (17, 4), cls=True, grid=(4, 4), tower="clip-test")
TEXT = ArraySpec("text", "float16", (5,), tower="clip-test")
ARRAYS = {"eva": EVA, "clip": CLIP, "text": TEXT}


def sample(number: int, arrays: dict[str, ArraySpec] = ARRAYS) -> dict[str, np.ndarray]:
    """Return the arrays of one sample, a function of its number."""
    rng = np.random.default_rng(number)
    return {
        name: (rng.normal(size=spec.shape) * (1 + np.arange(spec.shape[-1]))).astype(np.float16)
        for name, spec in arrays.items()
    }


def jpeg(number: int) -> bytes:
    """Return the thumbnail of a sample, a function of its number."""
    levels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(levels).save(out, "JPEG")
    return out.getvalue()


def write_store(
    folder: Path,
    train: int = 22,
    validation: int = 7,
    shard_samples: int = 5,
    arrays: dict[str, ArraySpec] = ARRAYS,
    reduced: str | None = None,
    thumbnails: bool = False,
) -> TokenIndex:
    """Write a store whose sample numbers run through train, then validation."""
    settings = (shard_samples, reduced, "by number")
    with TokenWriter(folder, arrays, *settings, thumbnails=thumbnails) as writer:
        for number in range(train + validation):
            split = "train" if number < train else "validation"
            key = f"{number:06d}"
            picture = jpeg(number) if thumbnails else None
            texts = (f"caption {number}", f"image {number}")
            writer.add(split, key, sample(number, arrays), *texts, thumbnail=picture)
    return TokenIndex.load(folder)


def int8_tokens(kind: str) -> np.ndarray:
    """Return tokens `[40, 17, 32]` for which one kind of int8 scale is the better one."""
    rng = np.random.default_rng(0)
    out = rng.uniform(-1, 1, (40, 17, 32))
    if kind == "token":
        out *= np.geomspace(0.01, 1, 40)[:, None, None]
    else:  # half of the channels are rarely other than 0, so most tokens hold some far outlier
        out[..., ::2] = np.sign(out[..., ::2]) * (rng.random((40, 17, 16)) < 1 / 8)
    out[:, 0] *= 50
    return (out * np.geomspace(0.1, 30, 32)).astype(np.float32)


def write_int8(folder: Path, value: np.ndarray) -> TokenIndex:
    """Write a store whose conditions are int8 and whose targets are the same tokens in fp16."""
    plain = ArraySpec("tokens", "float16", (17, 32), cls=True, grid=(4, 4))
    spec, scale_KC = fit_int8(plain, value)
    with TokenWriter(folder, {"eva": spec, "clip": plain}, 7, scales={"eva": scale_KC}) as writer:
        for number, row in enumerate(value):
            writer.add("train", f"{number:03d}", {"eva": row, "clip": row})
    return TokenIndex.load(folder)
