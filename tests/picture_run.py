"""A store whose tokens are a linear function of pictures, and a run on it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from made_run import make_run, small_config
from PIL import Image

from blip3o_lit.tokens.store.index import ArraySpec
from blip3o_lit.tokens.store.shards import TokenWriter

EVA = ArraySpec("tokens", "float32", (16, 6), grid=(4, 4), tower="eva-test")
CLIP = ArraySpec("tokens", "float32", (16, 12), grid=(4, 4), tower="clip-test")
TRAIN, VALIDATION = 48, 16


def picture_store(
    folder: Path,
    seed: int = 0,
    thumbnails: bool = True,
    turned: bool = False,
    target: ArraySpec = CLIP,
) -> Path:
    """Write a store whose target tokens are a linear function of smooth pictures.

    With `turned` those of the validation split are another function of them.
    """
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, target.shape[1]))
    settings = {"shard_samples": 16, "thumbnails": thumbnails}
    with TokenWriter(folder, {"eva": EVA, "clip": target}, **settings) as writer:
        for number in range(TRAIN + VALIDATION):
            split = "train" if number < TRAIN else "validation"
            draw = rng if split == "train" else np.random.default_rng([seed, number])
            colours = draw.integers(30, 226, (4, 4, 3), np.uint8)
            levels = np.kron(colours, np.ones((4, 4, 1), np.uint8))
            out = io.BytesIO()
            Image.fromarray(levels).save(out, "JPEG", quality=95, subsampling=0)
            clip = colours.reshape(16, 3) / 128 @ weight
            if turned and split == "validation":
                clip = -clip
            arrays = {"eva": draw.normal(size=(16, 6)), "clip": clip}
            arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
            picture = out.getvalue() if thumbnails else None
            writer.add(split, f"{number:03d}", arrays, source=f"{number}.jpg", thumbnail=picture)
    return folder


def run_on(store: Path, folder: Path) -> Path:
    config = small_config()
    config.data = replace(config.data, name="tokens", tokens=str(store))
    return make_run(folder, store, config)
