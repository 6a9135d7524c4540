"""Index, order and resume for 10 million samples in 40,000 shards (no tokens behind)."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import result
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex

SHARDS, SHARD_SAMPLES, WINDOW, BATCH = 40_000, 250, 16, 4096
HELD_OUT = 400
ARRAYS = {
    "eva": ArraySpec("tokens", "float16", (257, 4096), True, (16, 16), "eva8b"),
    "clip": ArraySpec("tokens", "float16", (257, 1024), True, (16, 16), "clipl14"),
}


def fake_index() -> TokenIndex:
    """Return an index of shards that don't exist."""
    shards = []
    for number in range(SHARDS):
        split = "validation" if number < HELD_OUT else "train"
        name = f"{split}-{number:06d}"
        sha256 = f"{number:064x}"
        size = SHARD_SAMPLES * 2_700_000
        shards.append(ShardEntry(f"{name}.tar", f"{name}.idx", split, SHARD_SAMPLES, size, sha256))
    return replace(TokenIndex(ARRAYS, shards), split_rule="by number")


def megabytes() -> float:
    """Return this process's resident memory in MB; its peak where /proc does not tell."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def open_store(folder: str) -> dict[str, float]:
    """Open the store, then plan the first batch; return seconds of each and MB above the imports.

    Planning includes the content hash that a run notes and looks its token scales up by.
    """
    before, started = megabytes(), time.perf_counter()
    reader = TokenReader(TokenStore.open(folder), "train")
    opened = time.perf_counter()
    assert reader.content_hash
    SampleOrder(0, reader.shard_sizes, WINDOW).at(0, BATCH)
    planned = time.perf_counter()
    memory = megabytes() - before
    return {"open": opened - started, "plan": planned - opened, "memory": memory}


def run() -> list[dict[str, Any]]:
    """Time opening (in a process of its own), a resume, and the order of a whole epoch."""
    index = fake_index()
    with tempfile.TemporaryDirectory() as folder:
        index.write(Path(folder))
        command = [sys.executable, "-m", "benchmarks.scale", folder]
        opened = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    sizes = np.array([shard.samples for shard in index.shards if shard.split == "train"])
    total = int(sizes.sum())
    started = time.perf_counter()
    SampleOrder(0, sizes, WINDOW).at(17 * total + 1_234_567, BATCH)
    resuming = time.perf_counter() - started
    order = SampleOrder(1, sizes, WINDOW)
    started = time.perf_counter()
    seen = np.zeros(total, np.uint8)
    for position in range(0, total, BATCH):
        ids, _ = order.at(position, min(BATCH, total - position))
        seen[ids] += 1
    epoch = time.perf_counter() - started
    assert (seen == 1).all()
    return [
        result("scale/open_seconds", opened["open"], "s", 2, "lower"),
        result("scale/plan_seconds", opened["plan"], "s", 0.5, "lower"),
        result("scale/open_memory_above_imports", opened["memory"], "MB", 500, "lower"),
        result("scale/resume_seconds", resuming, "s", 0.5, "lower"),
        result("scale/epoch_order_seconds", epoch, "s", 2, "lower"),
    ]


if __name__ == "__main__":
    print(json.dumps(open_store(sys.argv[1])))
