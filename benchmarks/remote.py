"""A store in a bucket beside a bare download of the same objects, a local store and two peers.

The server is a real one for S3, in a process of its own on this machine: no network is measured,
and it takes its share of the cores. Cold is with an empty cache, warm the epoch after it; the bare
download writes files, in as many streams, and checks nothing. MosaicML Streaming and LitData read
the same tokens (fp16, one row per array, shards of the same size) where PEERS names a Python that
has them: PEERS=DIR/bin/python make bench ONLY=remote
"""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import obstore
from obstore.store import from_url

from benchmarks.made_store import ARRAYS, BATCH
from benchmarks.timing import interleaved, result
from blip3o_lit.base.objects import CHUNK, Objects
from blip3o_lit.config.data import DataConfig
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.loader import TokenLoader
from blip3o_lit.tokens.reading.open import open_store
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.shard_cache import FETCHES
from blip3o_lit.tokens.store.shards import TokenWriter

SAMPLES, SHARD, WINDOW, ROUNDS = 256, 32, 2, 5
WARM_ROUNDS = 100
"""An epoch from memory takes a tenth of a second, and single ones differ by a fifth."""
BLOCK = 1 << 24
KEYS = {"AWS_ACCESS_KEY_ID": "bench-key", "AWS_SECRET_ACCESS_KEY": "bench-secret"}
PEERS = {"streaming": "MosaicML Streaming", "litdata": "LitData"}


@contextmanager
def served(folder: Path) -> Iterator[None]:
    """Serve the buckets in a folder, and tell clients where they are."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    endpoint = f"http://127.0.0.1:{port}"
    own = dict(zip(("NANIO_ACCESS_KEY", "NANIO_SECRET_KEY"), KEYS.values()))
    words = ["--data-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [Path(sys.executable).with_name("nanio"), "serve", "--no-access-log", *words],
        env={**os.environ, **own},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_REGION="us-east-1")
    os.environ.update(S3_ENDPOINT_URL=endpoint, AWS_DEFAULT_REGION="us-east-1")
    os.environ["AWS_ALLOW_HTTP"] = "true"  # asked for by the peers
    try:
        for _ in range(200):
            with socket.socket() as test:
                if test.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield
    finally:
        server.kill()
        server.wait()


def write(folder: Path) -> None:
    """Write random tokens into a store of small shards."""
    rng = np.random.default_rng(0)
    with TokenWriter(folder, ARRAYS, SHARD) as writer:
        for number in range(SAMPLES):
            tokens = {n: rng.normal(size=s.shape).astype(np.float16) for n, s in ARRAYS.items()}
            writer.add("train", f"{number:06d}", tokens)


def download(url: str, folder: Path) -> None:
    """Get a store's objects into files, as many at a time as the package gets."""
    store = from_url(url, client_options={"allow_http": True})
    names = [str(item["path"]) for item in obstore.list(store).collect()]

    def get(name: str) -> None:
        with (folder / name).open("wb", buffering=0) as file:
            for chunk in obstore.get(store, name).stream(CHUNK):
                file.write(chunk)

    folder.mkdir()
    with ThreadPoolExecutor(FETCHES) as pool:
        list(pool.map(get, names))


def epoch(store: TokenStore, number: int) -> None:
    """Take an epoch's batches as training does."""
    reader = TokenReader(store, "train")
    order = SampleOrder(number, reader.shard_sizes, WINDOW)
    plan = BatchPlan(BATCH, 1, BATCH)
    for batch in TokenLoader(reader, order, plan, SAMPLES // BATCH):
        assert len(batch["sample"]) == BATCH


def drop(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def drain(path: Path) -> None:
    """Read all bytes in blocks."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def from_disk(folder: Path) -> dict[str, float]:
    """Time all tokens from a cold disk, and all bytes so."""
    files = sorted(folder.glob("*.tar"))

    def cold(work: Callable[[], None]) -> None:
        for file in files:
            drop(file)
        work()

    def read_bytes() -> None:
        for file in files:
            drain(file)

    return interleaved(
        {
            "cold disk, tokens": lambda: cold(lambda: epoch(TokenStore.open(folder), 0)),
            "cold disk, bytes": lambda: cold(read_bytes),
        },
        rounds=3,
    )


def peer(python: str, name: str, folder: Path) -> tuple[float, float]:
    """Return the median seconds of a peer's cold and warm epoch."""
    script = Path(__file__).with_name("peers.py")
    words = [python, script, name, folder, SAMPLES, SHARD, BATCH, ROUNDS]
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"  {PEERS[name]} failed: {done.stderr[-600:]}")
        return float("nan"), float("nan")
    times = json.loads(done.stdout.splitlines()[-1])
    return statistics.median(times["cold"]), statistics.median(times["warm"])


def run() -> list[dict[str, Any]]:
    """Time epochs from a bucket, cold and warm, beside their ceilings and peers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        url = "s3://bench/store"
        write(folder / "buckets" / "bench" / "store")
        local = folder / "buckets" / "bench" / "store"
        seconds = from_disk(local)
        with served(folder / "buckets"):
            data = DataConfig(
                name="tokens", tokens=url, cache=str(folder / "cache"), shuffle_window=WINDOW
            )
            assert Objects(url).size("index.json")

            def cold() -> None:
                shutil.rmtree(folder / "cache", ignore_errors=True)
                epoch(open_store(url, data), 0)

            def bare() -> None:
                shutil.rmtree(folder / "bare", ignore_errors=True)
                download(url, folder / "bare")

            seconds |= interleaved({"bare download": bare, "cold epoch": cold}, rounds=ROUNDS)
            warm, plain, again = (
                open_store(url, data),
                TokenStore.open(local),
                TokenStore.open(local),
            )
            seconds |= interleaved(
                {
                    "warm epoch": lambda: epoch(warm, 1),
                    "local epoch": lambda: epoch(plain, 1),
                    "local epoch, once more": lambda: epoch(again, 1),  # what chance does
                },
                rounds=WARM_ROUNDS,
            )
            for package, title in PEERS.items() if os.environ.get("PEERS") else ():
                times = peer(os.environ["PEERS"], package, folder)
                seconds[f"{title}, cold"], seconds[f"{title}, warm"] = times
    size = SAMPLES * sum(spec.nbytes for spec in ARRAYS.values()) / 1e6
    for case, value in seconds.items():
        print(f"  {case:<26} {size / value:8.0f} MB/s  {SAMPLES / value:8.0f} samples/s")
    results = [
        ("cold_disk_over_reading_the_bytes", "cold disk, bytes", "cold disk, tokens", 0.5),
        ("cold_epoch_over_bare_download", "bare download", "cold epoch", 0.7),
        ("warm_epoch_over_local", "local epoch", "warm epoch", 0.95),
    ]
    if os.environ.get("PEERS"):
        for temperature, target in (("cold", 1.0), ("warm", 2.0)):
            named = [f"{title}, {temperature}" for title in PEERS.values()]
            known = [name for name in named if not math.isnan(seconds[name])]
            if not known:
                continue  # why was printed
            best = min(known, key=seconds.__getitem__)
            case = f"{temperature} epoch"
            results.append((f"{temperature}_epoch_over_the_better_peer", best, case, target))
    return [
        result(f"remote/{name}", seconds[ceiling] / seconds[case], "x", target)
        for name, ceiling, case, target in results
    ]
