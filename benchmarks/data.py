"""Reading an indexed shard, beside webdataset's decoding and a plain copy of the same bytes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.timing import interleaved, result, save, show
from blip3o_lit.tokens.reader import TokenReader, TokenStore
from blip3o_lit.tokens.shards import ArraySpec, TokenWriter

SAMPLES, BATCH = 64, 8
ARRAYS = {
    "eva": ArraySpec("tokens", "float16", (256, 4096), grid=(16, 16)),
    "clip": ArraySpec("tokens", "float16", (256, 1024), grid=(16, 16)),
}


def write(folder: Path) -> None:
    """Write one shard of the mission's shapes: 64 samples, 168 MB."""
    rng = np.random.default_rng(0)
    with TokenWriter(folder, ARRAYS, shard_samples=SAMPLES) as writer:
        for number in range(SAMPLES):
            arrays = {
                name: rng.standard_normal(spec.shape, np.float32).astype(np.float16)
                for name, spec in ARRAYS.items()
            }
            writer.add("train", f"{number:06d}", arrays, "a caption", "a source")


def run() -> list[dict[str, Any]]:
    """Time the three ways of getting every token once, from a warm page cache, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        store = TokenStore.open(folder)
        reader = TokenReader(store, "train")
        path = folder / "train-000000.tar"
        raw = np.memmap(path, np.uint8, "r")
        step = BATCH * sum(spec.nbytes for spec in ARRAYS.values())
        order = np.random.default_rng(0).permutation(SAMPLES).reshape(-1, BATCH)

        def read(source: TokenReader) -> None:
            for ids in order:
                source.read(ids)

        def decode() -> None:
            for sample in webdataset.WebDataset(str(path), shardshuffle=False).decode():
                assert sample["eva.npy"].ndim == sample["clip.npy"].ndim == 2

        buffer = np.empty(step, np.uint8)

        def copy() -> None:
            for number in range(len(order)):
                np.copyto(buffer, raw[number * step : (number + 1) * step])

        seconds = interleaved(
            {
                "indexed": lambda: read(reader),
                "first": lambda: read(TokenReader(store, "train")),
                "webdataset": decode,
                "copy": copy,
            }
        )
    torch.set_num_threads(threads)
    megabytes = SAMPLES * sum(spec.nbytes for spec in ARRAYS.values()) / 1e6
    for case, value in seconds.items():
        print(f"  {case:<10} {megabytes / value:8.0f} MB/s  {SAMPLES / value:8.0f} samples/s")
    ratio = {case: seconds[case] / seconds["indexed"] for case in seconds}
    first = seconds["webdataset"] / seconds["first"]
    return [
        result("data/indexed_over_webdataset", ratio["webdataset"], "x", 8),
        result("data/indexed_over_plain_copy", ratio["copy"], "x", 0.6),
        result("data/first_pass_over_webdataset", first, "x", 6),
    ]


if __name__ == "__main__":
    found = run()
    show(found)
    save(found)
    sys.exit(0)
