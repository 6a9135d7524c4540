"""Reading an indexed shard, beside webdataset's decoding and a plain copy of the same bytes.

Then int8 beside fp16, as training is handed it (restored later, on the device) and with the
restoring done here, and how long a loop waits for its batches that computes as fast as `base`
trains on two cores, and 20 times as fast (it sleeps in place of computing).
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset

from benchmarks.made_store import ARRAYS, BATCH, SAMPLES, write
from benchmarks.timing import interleaved, result
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.loader import TokenLoader
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.packed import restored
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as

BASE = 3.0
"""Images a second that `base` trains on two cores."""


def waiting(reader: TokenReader, images_a_second: float, batches: int) -> float:
    """Return the share of a consumer's time spent waiting, the first batch left out."""
    plan = BatchPlan(BATCH, 1, BATCH)
    loader = TokenLoader(reader, SampleOrder(0, reader.shard_sizes, 4), plan, batches)
    source = iter(loader)
    next(source)
    waited, began = 0.0, time.perf_counter()
    while True:
        time.sleep(BATCH / images_a_second)
        asked = time.perf_counter()
        if next(source, None) is None:
            return waited / (time.perf_counter() - began)
        waited += time.perf_counter() - asked


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

        copy_as(store, folder / "int8", "int8")
        small = TokenReader(TokenStore.open(folder / "int8"), "train")

        def read(source: TokenReader) -> None:
            for ids in order:
                source.read(ids)

        def hand_over(source: TokenReader) -> None:
            for ids in order:
                source.read_packed(ids)

        packed = small.read_packed(order[0])

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
                "int8, handed over": lambda: hand_over(small),
                "int8, restored": lambda: read(small),
                "restoring one batch": lambda: restored(packed),
            }
        )
        halved = sum(path.stat().st_size for path in (folder / "int8").glob("*.tar"))
        halved /= sum(path.stat().st_size for path in folder.glob("*.tar"))
        waits = [waiting(reader, speed, 4 if speed == BASE else 24) for speed in (BASE, 20 * BASE)]
    torch.set_num_threads(threads)
    megabytes = SAMPLES * sum(spec.nbytes for spec in ARRAYS.values()) / 1e6
    restoring = seconds.pop("restoring one batch")
    for case, value in seconds.items():
        print(f"  {case:<17} {megabytes / value:8.0f} MB/s  {SAMPLES / value:8.0f} samples/s")
    print(f"  restoring a batch of {BATCH} from int8 on one thread: {1e3 * restoring:.1f} ms")
    ratio = {case: seconds[case] / seconds["indexed"] for case in seconds}
    first = seconds["webdataset"] / seconds["first"]
    return [
        result("data/indexed_over_webdataset", ratio["webdataset"], "x", 10),
        result("data/indexed_over_plain_copy", ratio["copy"], "x", 0.8),
        result("data/first_pass_over_webdataset", first, "x", 6),
        result("data/int8_bytes_over_fp16", halved, "x", 0.51, "lower"),
        result("data/int8_handed_over_over_fp16_samples", 1 / ratio["int8, handed over"], "x", 1.0),
        result(
            "data/int8_restoring_over_base_step", restoring * BASE / BATCH, "share", 0.01, "lower"
        ),
        result("data/wait_at_base_speed", waits[0], "share", 0.01, "lower"),
        result("data/wait_at_20x_base_speed", waits[1], "share", 0.01, "lower"),
    ]
