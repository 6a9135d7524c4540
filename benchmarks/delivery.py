"""Batches as training is handed them: read ahead by threads, on the device, int8 restored there.

Beside them webdataset's decoded samples stacked to the same batches, and copies of the same bytes
by as many threads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.made_store import ARRAYS, BATCH, SAMPLES, write
from benchmarks.timing import interleaved, result
from blip3o_lit.config.data import DataConfig
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.loader import TokenLoader
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.packed import on_device
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as

EPOCHS = 4
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SAMPLE = sum(spec.nbytes for spec in ARRAYS.values())


def taken(folder: Path, threads: int) -> Callable[[], None]:
    """Return a function that takes every batch of some epochs and leaves it on the device."""
    reader = TokenReader(TokenStore.open(folder), "train")
    order = SampleOrder(0, reader.shard_sizes, 4)
    steps = EPOCHS * SAMPLES // BATCH
    pin = DEVICE.type == "cuda"

    def take() -> None:
        plan = BatchPlan(BATCH, 1, BATCH)
        for batch in TokenLoader(reader, order, plan, steps, threads=threads, pin=pin):
            on_device(batch, DEVICE)
        if pin:
            torch.cuda.synchronize()

    return take


def decoded(shard: Path) -> Callable[[], None]:
    """Return a function that takes the same batches from webdataset."""
    import webdataset

    def take() -> None:
        for _ in range(EPOCHS):
            pipe = webdataset.WebDataset(str(shard), shardshuffle=False).decode()
            for eva, clip in pipe.to_tuple("eva.npy", "clip.npy").batched(BATCH):
                assert len(eva) == len(clip) == BATCH

    return take


def copied(shard: Path, threads: int) -> Callable[[], None]:
    """Return a function that copies as many bytes out of the mapped shard, batch by batch.

    Into as many buffers in turn as the loader has batches under way: one alone stays in the cache.
    """
    raw = np.memmap(shard, np.uint8, "r")
    buffers = [np.empty(BATCH * SAMPLE, np.uint8) for _ in range(3 * threads)]
    pool = ThreadPoolExecutor(threads)

    def copy(worker: int) -> None:
        for number in range(worker, EPOCHS * SAMPLES // BATCH, threads):
            start = number % (SAMPLES // BATCH) * BATCH * SAMPLE
            np.copyto(buffers[number % len(buffers)], raw[start : start + BATCH * SAMPLE])

    return lambda: list(pool.map(copy, range(threads))) and None


def run() -> list[dict[str, Any]]:
    """Time them on a warm page cache."""
    threads = DataConfig().threads
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        copy_as(TokenStore.open(folder), folder / "int8", "int8")
        shard = folder / "train-000000.tar"
        cases = {
            "fp16": taken(folder, threads),
            "int8": taken(folder / "int8", threads),
            "copy": copied(shard, threads),
        }
        if find_spec("webdataset"):
            cases["webdataset"] = decoded(shard)
        seconds = interleaved(cases, rounds=5)
    gigabytes = EPOCHS * SAMPLES * SAMPLE / 1e9
    for case, value in seconds.items():
        rate, images = gigabytes / value, EPOCHS * SAMPLES / value
        print(f"  {case:<10} {rate:6.2f} GB/s of fp16  {images:7.0f} images/s on {DEVICE.type}")
    found = [
        result("delivery/gigabytes_a_second", gigabytes / seconds["fp16"], "GB/s", 1.0),
        result("delivery/over_copies", seconds["copy"] / seconds["fp16"], "x", 0.8),
    ]
    if "webdataset" in seconds:
        ratio = seconds["webdataset"] / seconds["fp16"]
        found.append(result("delivery/over_webdataset_batches", ratio, "x", 10))
    return found
