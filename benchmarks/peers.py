"""One peer of `benchmarks/remote.py`, run by a Python that has it: cold and warm epochs, as JSON.

It imports nothing of this repository: the peers want other versions of its packages.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

SHAPES = {"eva": (256, 4096), "clip": (256, 1024)}
BYTES = sum(2 * rows * columns for rows, columns in SHAPES.values())


def samples(indices: Iterator[int]) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in indices:
        yield {name: rng.normal(size=shape).astype(np.float16) for name, shape in SHAPES.items()}


def mosaic(folder: Path, count: int, shard: int, batch: int) -> Callable[[bool], None]:
    """Write the bucket's objects; return what takes an epoch, with an empty cache or not."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    columns = {name: f"ndarray:float16:{','.join(map(str, s))}" for name, s in SHAPES.items()}
    out = str(folder / "buckets" / "bench" / "mds")
    with MDSWriter(out=out, columns=columns, size_limit=shard * BYTES + (1 << 16)) as writer:
        for sample in samples(iter(range(count))):
            writer.write(sample)
    cache = folder / "mds"

    def epoch(cold: bool) -> None:
        if cold:
            shutil.rmtree(cache, ignore_errors=True)
        clean_stale_shared_memory()
        data = StreamingDataset(
            remote="s3://bench/mds", local=str(cache), shuffle=True, batch_size=batch
        )
        rows = sum(len(item["eva"]) for item in DataLoader(data, batch_size=batch, num_workers=2))
        assert rows == count

    return epoch


def litdata(folder: Path, count: int, shard: int, batch: int) -> Callable[[bool], None]:
    """Do the same with LitData."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import Cache

    out = folder / "buckets" / "bench" / "lit"
    cache = Cache(str(out), chunk_size=shard)
    for number, sample in enumerate(samples(iter(range(count)))):
        cache[number] = sample
    cache.done()
    cache.merge()
    endpoint = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    here = folder / "lit"

    def epoch(cold: bool) -> None:
        if cold:
            shutil.rmtree(here, ignore_errors=True)
        data = StreamingDataset(
            "s3://bench/lit", cache_dir=str(here), shuffle=True, storage_options=endpoint
        )
        loader = StreamingDataLoader(data, batch_size=batch, num_workers=2)
        assert sum(len(item["eva"]) for item in loader) == count

    return epoch


def main() -> None:
    name, folder = sys.argv[1], Path(sys.argv[2])
    count, shard, batch, rounds = map(int, sys.argv[3:])
    epoch = {"streaming": mosaic, "litdata": litdata}[name](folder, count, shard, batch)
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(rounds + 1):
        for case in times:
            started = time.perf_counter()
            epoch(case == "cold")
            if number:
                times[case].append(time.perf_counter() - started)
    print(json.dumps(times))


if __name__ == "__main__":
    main()
