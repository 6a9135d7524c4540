"""A store of random tokens of the mission's shapes, to read from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter

SAMPLES, BATCH = 64, 8
ARRAYS = {
    "eva": ArraySpec("tokens", "float16", (256, 4096), grid=(16, 16)),
    "clip": ArraySpec("tokens", "float16", (256, 1024), grid=(16, 16)),
}


def write(folder: Path, specs: dict[str, ArraySpec] = ARRAYS) -> None:
    """Write one shard of 64 samples; of the mission's shapes they are 168 MB."""
    rng = np.random.default_rng(0)
    with TokenWriter(folder, specs, shard_samples=SAMPLES) as writer:
        for number in range(SAMPLES):
            arrays = {
                name: rng.standard_normal(spec.shape, np.float32).astype(np.float16)
                for name, spec in specs.items()
            }
            writer.add("train", f"{number:06d}", arrays, "a caption", "a source")
