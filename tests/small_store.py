"""A small token store of random numbers, for tests of everything that reads one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blip3o_lit.tokens.shards import ArraySpec, TokenIndex, TokenWriter

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


def write_store(
    folder: Path,
    train: int = 22,
    validation: int = 7,
    shard_samples: int = 5,
    arrays: dict[str, ArraySpec] = ARRAYS,
    reduced: str | None = None,
) -> TokenIndex:
    """Write a store whose sample numbers run through train, then validation."""
    with TokenWriter(folder, arrays, shard_samples, reduced, "by number") as writer:
        for number in range(train + validation):
            split = "train" if number < train else "validation"
            key = f"{number:06d}"
            writer.add(split, key, sample(number, arrays), f"caption {number}", f"image {number}")
    return TokenIndex.load(folder)
