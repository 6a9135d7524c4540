"""What a large cluster would ask of this repository: the figures of docs/scaling.md.

    python scripts/simulate_cluster.py                        1,000 GPUs, 100 M images
    python scripts/simulate_cluster.py gpus=64 images=5e6     another size

The order of samples is built for real; failures are drawn; the rest is arithmetic, printed with its
assumptions. Nothing here was measured on a cluster.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields

import numpy as np

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.states import units
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.store.index import ShardEntry

SAVED_BYTES = 16
"""Per parameter, in fp32: weights 4, EMA 4, Adam's moments 8."""
RUNS, STEPS, WINDOWS = 200, 50, 64
"""Simulated runs, steps and shuffle windows that are averaged."""
MODELS = {
    "base": ModelConfig(width=768, depth=12, heads=12, kv_heads=4, mlp_width=2048),
    "large": ModelConfig(width=1024, depth=20, heads=16, kv_heads=8, mlp_width=4096),
    "nextdit": ModelConfig(
        architecture="nextdit",
        width=1792,
        depth=24,
        heads=28,
        kv_heads=28,
        mlp_width=0,
        conditioning="cross",
        key_rope=False,
    ),
}
STORES = {
    "full": PairShape(TokenShape((16, 16), True, 4096), TokenShape((16, 16), True, 1024)),
    "grid_64": PairShape(TokenShape((8, 8), False, 1280), TokenShape((8, 8), False, 768)),
}


TOWERS = {"eva8b_clipl14": 4.06e12, "eva02l_clipl14": 0.32e12}
"""Operations of both towers for one image, as `extract towers=NAME dry_run=true` counts them."""


@dataclass
class Assumptions:
    """What the figures depend on; each can be given as KEY=VALUE."""

    images: float = 100e6
    gpus: float = 1000
    node_gpus: float = 8
    picture_kb: float = 165
    """Of a JPEG: the public BLIP3o tars have 16.5 GB for 100,000."""
    core_decodes: float = 200
    """Pictures of 400x400 that a core decodes and prepares a second (benchmarks ONLY=decoding)."""
    shard_samples: float = 256
    window: float = 16
    """Shards that are shuffled together."""
    batch: float = 8192
    peak: float = 989e12
    """bf16 operations per second of one GPU (H100 SXM, dense)."""
    mfu: float = 0.4
    gpu_hours_per_failure: float = 50_700
    """Llama 3 405B: 419 unexpected interruptions in 54 days of 16,384 GPUs (arXiv 2407.21783)."""
    restart_minutes: float = 10
    """From a failure to the first new step: scheduler, imports, reading the checkpoint."""
    write_gbps: float = 10
    """GB/s at which the file system takes a checkpoint from all ranks together."""
    days: float = 10
    """Length of the run without failures."""


def token_bytes(shape: PairShape) -> int:
    """Return the bytes of one image's tokens in fp16."""
    return 2 * sum(side.tokens * side.width for side in (shape.condition, shape.target))


def shards(facts: Assumptions) -> list[list[str]]:
    count = math.ceil(facts.images / facts.shard_samples)
    entry = ShardEntry("train-0000000.tar", "train-0000000.idx", "train", 256, 10**9, "0" * 64)
    index = count * (len(json.dumps(asdict(entry))) + 2)
    return [
        [
            name,
            f"{count:,}",
            f"{token_bytes(shape) * facts.shard_samples / 1e6:,.0f} MB",
            f"{token_bytes(shape) * facts.images / 1e12:,.1f} TB",
            f"{index / 1e6:,.0f} MB",
        ]
        for name, shape in STORES.items()
    ]


def order(facts: Assumptions) -> list[list[str]]:
    """Build the order of the whole store and time what a start, a step and a resume take."""
    count = math.ceil(facts.images / facts.shard_samples)
    sizes = np.full(count, int(facts.shard_samples), np.int64)
    batch, window = int(facts.batch), int(facts.window)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    plan = SampleOrder(0, sizes, window)
    plan.at(0, batch)
    started = time.perf_counter()
    for step in range(1, STEPS + 1):
        plan.at(batch * step, batch)
    stepped = time.perf_counter()
    SampleOrder(0, sizes, window).at(int(3.7 * facts.images), batch)
    resumed = time.perf_counter()
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return [
        ["start: epoch and first global batch", f"{started - began:.2f} s"],
        [f"each further global batch of {batch:,}", f"{1e3 * (stepped - started) / STEPS:.1f} ms"],
        ["resume in the middle of epoch 4", f"{resumed - stepped:.2f} s"],
        ["memory, each rank", f"{memory:.0f} MB"],
        ["state in a checkpoint", "two integers"],
    ]


def traffic(facts: Assumptions) -> list[list[str]]:
    """Return what each model reads per second, and what its checkpoints are."""
    rows = []
    for name, model in MODELS.items():
        parameters = units(model, STORES["full"]).total
        arithmetic = facts.gpus * facts.peak * facts.mfu
        # Forward and backward are three times the forward pass.
        images = {
            store: arithmetic / (3 * units(model, shape).forward_flops)
            for store, shape in STORES.items()
        }
        reads = {store: images[store] * token_bytes(shape) / 1e9 for store, shape in STORES.items()}
        saved = SAVED_BYTES * parameters
        rows.append(
            [
                name,
                f"{parameters / 1e6:,.0f} M",
                f"{images['full']:,.0f}",
                f"{reads['full']:,.0f} GB/s",
                f"{reads['grid_64']:,.0f} GB/s",
                f"{saved / 1e9:.1f} GB",
                f"{saved / facts.gpus / 1e6:,.0f} MB",
                f"{saved / 1e9 / facts.write_gbps:.1f} s",
            ]
        )
    return rows


def fetches(facts: Assumptions, window: int, caches: int) -> float:
    """Return how often a shard is fetched in an epoch: by every cache whose ranks read from it."""
    size, batch = int(facts.shard_samples), int(facts.batch)
    sizes = np.full(math.ceil(facts.images / size), size, np.int64)
    steps = max(1, round(WINDOWS * window * size / batch))
    ids_SB = SampleOrder(0, sizes, window).at(0, steps * batch)[0].reshape(steps, batch)
    shards_SB = ids_SB // size
    cache_B = np.arange(batch) * caches // batch
    return len(np.unique(cache_B * len(sizes) + shards_SB)) / len(np.unique(shards_SB))


def caches(facts: Assumptions) -> list[list[str]]:
    """Return what a bucket must deliver so that `nextdit` doesn't wait, a cache on every node."""
    nodes = max(1, int(facts.gpus / facts.node_gpus))
    rows = []
    for store, shape in STORES.items():
        forward = units(MODELS["nextdit"], shape).forward_flops
        read = facts.gpus * facts.peak * facts.mfu / (3 * forward) * token_bytes(shape) / 1e9
        shard = facts.shard_samples * token_bytes(shape) / 1e9
        for window in (int(facts.window), 4, 1):
            for shared in sorted({nodes, max(1, nodes // 8), 1}, reverse=True):
                times = fetches(facts, window, shared)
                rows.append(
                    [
                        store,
                        f"{window}",
                        f"{shared:,}",
                        f"{times:.1f}",
                        f"{read * times:,.0f} GB/s",
                        f"{read * times / nodes:,.1f} GB/s",
                        f"{(2 * window + 2) * shard:,.1f} GB",
                    ]
                )
    return rows


def pictures(facts: Assumptions) -> list[list[str]]:
    """Return what runs straight from pictures ask of disks and cores, and what a store saves."""
    arithmetic = facts.gpus * facts.peak * facts.mfu
    stored = token_bytes(STORES["full"])
    rows = []
    for pair, towers in TOWERS.items():
        for name, model in MODELS.items():
            step = 3 * units(model, STORES["full"]).forward_flops
            images = arithmetic / (step + towers)
            rows.append(
                [
                    pair,
                    name,
                    f"{images:,.0f}",
                    f"{images * facts.picture_kb / 1e6:,.1f} GB/s",
                    f"{images / facts.gpus / facts.core_decodes:.1f}",
                    f"{facts.images / images / 60:,.0f} min",
                    f"{images * stored / 1e9:,.0f} GB/s",
                    f"{facts.images * step / arithmetic / 60:,.1f} min",
                ]
            )
    return rows


def simulate(work: float, interval: float, save: float, restart: float, mtbf: float) -> float:
    """Return wall time over useful time, failures drawn from an exponential law; all in seconds.

    A failure, after `mtbf` in the mean, loses the work since the last checkpoint, takes a restart,
    and may come during a save or a restart too.
    """
    draw = np.random.default_rng(0)
    segments = math.ceil(work / interval)
    left = np.full(RUNS, segments)
    wall = np.zeros(RUNS)
    restarting = np.zeros(RUNS, bool)
    while left.any():
        active = left > 0
        needed = interval + save + restart * restarting
        failure = draw.exponential(mtbf, RUNS)
        good = failure >= needed
        wall[active] += np.minimum(failure, needed)[active]
        left[active & good] -= 1
        restarting = ~good
    return float(wall.mean()) / (segments * interval)


def daly(interval: float, save: float, restart: float, mtbf: float) -> float:
    """Return the same by the closed form of Daly (2006)."""
    exponent = math.exp(restart / mtbf) * math.expm1((interval + save) / mtbf)
    return mtbf * exponent / interval


def failures(facts: Assumptions, save: float) -> list[list[str]]:
    mtbf = 3600 * facts.gpu_hours_per_failure / facts.gpus
    restart, work = 60 * facts.restart_minutes, 86_400 * facts.days
    best = math.sqrt(2 * save * mtbf)
    rows = []
    for minutes in sorted([best / 60, 5, 15, 30, 60, 120, 360]):
        interval = 60 * minutes
        simulated = simulate(work, interval, save, restart, mtbf)
        lost = (simulated - 1) * facts.gpus * facts.days * 24
        mark = " (Young's best)" if interval == best else ""
        rows.append(
            [
                f"{minutes:.1f} min{mark}",
                f"{100 * (simulated - 1):.2f} %",
                f"{100 * (daly(interval, save, restart, mtbf) - 1):.2f} %",
                f"{100 * save / interval:.2f} %",
                f"{lost:,.0f}",
            ]
        )
    return rows


def show(title: str, heads: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


def main() -> None:
    known = {item.name for item in fields(Assumptions)}
    facts = Assumptions()
    for word in sys.argv[1:]:
        key, equals, value = word.partition("=")
        if key not in known or not equals:
            sys.exit(f"error: {word} is not KEY=VALUE of: {', '.join(sorted(known))}")
        setattr(facts, key, float(value))
    for item in fields(Assumptions):
        print(f"{item.name} = {getattr(facts, item.name):g}")
    show("Stores", ["store", "shards", "a shard", "tokens", "index.json"], shards(facts))
    show("Order", ["what", "takes"], order(facts))
    heads = ["model", "parameters", "images/s", "reads, full", "reads, grid_64", "checkpoint"]
    heads += ["each rank", "write"]
    show("Traffic", heads, traffic(facts))
    heads = ["store", "data.shuffle_window", "caches", "fetches of a shard, an epoch"]
    heads += ["bucket, nextdit", "a node", "least data.cache_gb"]
    show("A bucket and caches of whole shards", heads, caches(facts))
    heads = ["towers", "model", "images/s", "pictures", "cores a GPU", "an epoch"]
    heads += ["data.keep writes, first epoch", "an epoch from the store"]
    show("Straight from pictures", heads, pictures(facts))
    parameters = units(MODELS["nextdit"], STORES["full"]).total
    save = SAVED_BYTES * parameters / 1e9 / facts.write_gbps
    mtbf = facts.gpu_hours_per_failure / facts.gpus
    title = f"Failures: one in {mtbf:.1f} h, a save stands for {save:.1f} s (nextdit)"
    heads = ["checkpoint every", "lost, simulated", "lost, Daly", "of it saving", "GPU-hours lost"]
    show(title, heads, failures(facts, save))


if __name__ == "__main__":
    main()
