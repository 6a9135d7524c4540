"""Tokens from a cold disk and over HTTP, beside a plain read of the same bytes the same way.

The server is Python's own, in a process of its own on this machine: the network is not measured.
Cold is after the kernel was told to drop the shard from its page cache; a virtual disk may have a
cache of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from blip3o_lit.tokens.reading.stream import StreamLoader, StreamReader
from blip3o_lit.tokens.store.remote_store import RemoteStore

from benchmarks.made_store import ARRAYS, BATCH, SAMPLES, write
from benchmarks.timing import interleaved, result
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.reader import TokenReader, TokenStore

BLOCK = 1 << 24


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a folder over HTTP on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(folder)]
    server = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{url}/index.json").close()
                break
            except OSError:
                time.sleep(0.05)
        yield url
    finally:
        server.kill()
        server.wait()


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drain(path_or_url: Path | str) -> None:
    """Read all bytes in blocks."""
    if isinstance(path_or_url, Path):
        with path_or_url.open("rb", buffering=0) as file:
            while file.read(BLOCK):
                pass
        return
    with urllib.request.urlopen(path_or_url) as answer:
        while answer.read(BLOCK):
            pass


def run() -> list[dict[str, Any]]:
    """Time getting every token once, from a cold disk and over HTTP."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder)
        shard = folder / "train-000000.tar"
        order = np.random.default_rng(0).permutation(SAMPLES).reshape(-1, BATCH)

        def cold_tokens() -> None:
            drop(shard)
            reader = TokenReader(TokenStore.open(folder), "train")
            for ids in order:
                reader.read(ids)

        def cold_bytes() -> None:
            drop(shard)
            drain(shard)

        seconds = interleaved({"cold tokens": cold_tokens, "cold bytes": cold_bytes}, rounds=5)
        with served(folder) as url:
            data = DataConfig(name="tokens", tokens=url)

            def stream() -> None:
                reader = StreamReader(RemoteStore(url), "train", data, ModeConfig())
                plan = BatchPlan(BATCH, 1, BATCH)
                for batch in StreamLoader(reader, 0, plan, SAMPLES // BATCH):
                    assert len(batch["sample"]) == BATCH

            def decode() -> None:
                for sample in webdataset.WebDataset(
                    f"{url}/{shard.name}", shardshuffle=False
                ).decode():
                    assert sample["eva.npy"].ndim == 2

            seconds |= interleaved(
                {
                    "streamed tokens": stream,
                    "streamed bytes": lambda: drain(f"{url}/{shard.name}"),
                    "streamed, webdataset": decode,
                },
                rounds=5,
            )
    megabytes = SAMPLES * sum(spec.nbytes for spec in ARRAYS.values()) / 1e6
    for case, value in seconds.items():
        print(f"  {case:<20} {megabytes / value:8.0f} MB/s  {SAMPLES / value:8.0f} samples/s")
    cold = seconds["cold bytes"] / seconds["cold tokens"]
    streamed = seconds["streamed bytes"] / seconds["streamed tokens"]
    peer = seconds["streamed, webdataset"] / seconds["streamed tokens"]
    return [
        result("remote/cold_over_reading_the_bytes", cold, "x", 0.5),
        result("remote/streamed_over_reading_the_bytes", streamed, "x", 0.3),
        result("remote/streamed_over_webdataset", peer, "x", 1.0),
    ]
