"""A small store whose images have captions: words of random numbers beside the grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from small_store import ARRAYS, sample

from blip3o_lit.tokens.store.index import ArraySpec, TokenIndex
from blip3o_lit.tokens.store.sequences import packed, sequence_specs
from blip3o_lit.tokens.store.shards import TokenWriter

LONGEST, WIDTH, CAPTIONS = 9, 5, 3


def words_of(number: int, longest: int = LONGEST, captions: int = CAPTIONS) -> list[np.ndarray]:
    """Return the captions of a sample, a function of its number: one at least."""
    rng = np.random.default_rng([number, 7])
    count = 1 + number % captions
    return [
        (3 + rng.normal(size=(rng.integers(1, longest + 1), WIDTH)) * (1 + np.arange(WIDTH)))
        .astype(np.float16)
        .astype(np.float32)
        for _ in range(count)
    ]


def write_words(
    folder: Path,
    train: int = 22,
    validation: int = 7,
    shard_samples: int = 5,
    grids: dict[str, ArraySpec] = ARRAYS,
    longest: int = LONGEST,
    first: int = 0,
    dtype: str = "float16",
) -> TokenIndex:
    """Write a store as `small_store.write_store` does, with words; samples count from `first`."""
    specs = sequence_specs("words", longest, WIDTH, CAPTIONS, dtype, "text-test")
    with TokenWriter(folder, {**grids, **specs}, shard_samples, None, "by number") as writer:
        for number in range(first, first + train + validation):
            split = "train" if number < first + train else "validation"
            arrays = sample(number, grids) | packed("words", words_of(number, longest), specs)
            writer.add(split, f"{number:06d}", arrays, f"caption {number}", f"image {number}")
    return TokenIndex.load(folder)
