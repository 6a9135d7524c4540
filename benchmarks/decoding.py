"""Decoding for `data=images`: images a second on a core, beside what a GPU with towers asks for.

Pictures are JPEGs of 400x400; decoded, turned to sRGB and prepared for both towers of a pair, as a
reader's threads do. A consumer that only sleeps takes batches at 0.8 of what all cores together
were measured at: the share of its time that it does not wait says whether reading keeps ahead.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.extraction import photographs
from benchmarks.timing import result
from blip3o_lit.base.shape import PairShape
from blip3o_lit.budget.machine import GPUS
from blip3o_lit.budget.states import units
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.towers import TowerConfig, TowersConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.extraction.direct.store import PictureReader, PictureStore
from blip3o_lit.tokens.reading.loader import prefetch
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.tower import tower_cost

IMAGES, BATCH, SECONDS = 64, 8, 6.0
GPU, SHARE = "H100", 0.4
CLIP = partial(TowerConfig, "open_clip", "ViT-L-14-quickgelu", "openai")
PAIRS = {
    "eva8b_clipl14": TowersConfig(
        TowerConfig("eva_clip", "EVA-CLIP-8B", precision="fp16"), CLIP(precision="fp16"), False
    ),
    "eva02l_clipl14": TowersConfig(
        TowerConfig("open_clip", "EVA02-L-14", "merged2b_s4b_b131k", precision="bf16"),
        CLIP(precision="bf16"),
        False,
    ),
}
READ = TowersConfig(
    TowerConfig("open_clip", "EVA02-B-16", precision="bf16"),
    TowerConfig("open_clip", "ViT-B-16", precision="bf16"),
    False,
)
"""Smaller towers of the same inputs (224 pixels, two preprocessings), for the reading itself."""


def asked(towers: TowersConfig) -> float:
    """Return the images a second that one GPU trains `base` on, both towers in front of it."""
    pair = [load_tower(t, False, "meta") for t in (towers.condition, towers.target)]
    shape = PairShape(*(tower.info.shape for tower in pair))
    step = 3.0 * units(ModelConfig(), shape).forward_flops
    return SHARE * GPUS[GPU].low / (step + sum(tower_cost(tower).flops for tower in pair))


def rate(reader: PictureReader, threads: int) -> float:
    """Return the images a second that are decoded and prepared by so many threads."""
    started, images = time.perf_counter(), 0
    batches = (np.arange(n * BATCH, (n + 1) * BATCH) % len(reader) for n in range(10**9))
    for batch in prefetch(reader.read_packed, batches, threads):
        images += len(next(iter(batch.values())))
        if time.perf_counter() - started > SECONDS:
            break
    return images / (time.perf_counter() - started)


def awake(reader: PictureReader, threads: int, speed: float) -> float:
    """Return the share of its time that a consumer of `speed` images a second does not wait."""
    batches = (np.arange(n * BATCH, (n + 1) * BATCH) % len(reader) for n in range(10**9))
    source = prefetch(reader.read_packed, batches, threads)
    next(source)
    started, slept = time.perf_counter(), 0.0
    while time.perf_counter() - started < SECONDS:
        time.sleep(BATCH / speed)
        slept += BATCH / speed
        next(source)
    return slept / (time.perf_counter() - started)


def run() -> list[dict[str, Any]]:
    """Read pictures from files with one thread, then with a thread a core."""
    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    with tempfile.TemporaryDirectory() as name:
        for item in photographs(IMAGES):
            content = item.read()
            assert isinstance(content, bytes)
            Path(name, item.source).write_bytes(content)
        os.environ["BLIP3O_HOME"] = name + "/home"
        config = TrainConfig(data=DataConfig(name="images", images=name), towers=READ)
        reader = PictureReader(PictureStore(config, "cpu"), "train")
        reader.read_packed(np.arange(BATCH))  # loads the towers
        one, all_cores = rate(reader, 1), rate(reader, cores)
        share = awake(reader, cores, 0.8 * all_cores)
    print(f"  a core              {one:8.1f} images/s")
    print(f"  {cores} cores             {all_cores:8.1f} images/s")
    for pair, towers in PAIRS.items():
        need = asked(towers)
        print(f"  {pair:<18}{need:8.1f} images/s asked by an {GPU}: {need / one:.1f} cores")
    return [
        result("decoding/images_a_second_and_core", one, "images/s", 60),
        result("decoding/consumer_that_never_waits", share, "x", 0.95),
    ]
