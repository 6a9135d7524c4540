"""Extraction, beside the towers' bare forward passes and a loop of one image at a time.

The bare passes take preloaded batches and write nothing. On a CPU there are two: with a batch's
sums spread over the cores, torch's default, and with a batch a core, which is faster and what
the engine does; decoding takes its own share of the same cores there. The loop of single images
runs twice: in the engine's own bf16, where 2x is not a CPU's figure (1.5 on two cores: one image is
enough to fill a core, but not a GPU), and in the fp32 that the seeds' scripts ran in on a CPU.
"""

from __future__ import annotations

import io
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.timing import interleaved, result
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.item import Item, Source, decode, slices
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.tower import Tower

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMAGES, BATCH = (2048, 64) if DEVICE == "cuda" else (24, 4)
PAIR = {
    "eva": TowerConfig("open_clip", "EVA02-B-16", "merged2b_s8b_b131k", precision="bf16"),
    "clip": TowerConfig("open_clip", "ViT-B-16", "openai", precision="bf16"),
}
"""Random weights; 17.6 GFLOP an image each. A larger pair hides the rest better still."""


def photographs(number: int) -> list[Item]:
    """Crops of scikit-learn's two photographs, 400x400, as JPEG files in memory."""
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    items: list[Item] = []
    for i in range(number):
        left, top = i * 7 % 240, i * 5 % 27
        buffer = io.BytesIO()
        crop = pictures[i % 2].crop((left, top, left + 400, top + 400))
        crop.save(buffer, "JPEG", quality=90)
        items.append(Item(f"{i:06d}.jpg", partial(bytes, buffer.getvalue()), split="train"))
    return items


def towers(precision: str = "bf16") -> dict[str, Tower]:
    """Build the pair."""
    return {
        name: load_tower(replace(config, precision=precision), False, DEVICE)
        for name, config in PAIR.items()
    }


def run() -> list[dict[str, Any]]:
    """Time them over the same images; every one ends with the tokens on the host."""
    threads = torch.get_num_threads()
    items, pair, single = photographs(IMAGES), towers(), towers("fp32")
    ready = [
        {name: tower.preprocess(decode(item.read())) for name, tower in pair.items()}
        for item in items
    ]
    batches = [
        {name: torch.stack([row[name] for row in ready[i : i + BATCH]]).to(DEVICE) for name in pair}
        for i in range(0, IMAGES, BATCH)
    ]
    source = Source("photographs", slices(list(items), 4 * BATCH), captions=False)
    engine = EngineConfig(batch_size=BATCH, shard_samples=4 * BATCH, device=DEVICE)
    config = ExtractConfig(images="photographs", extract=engine)

    @torch.inference_mode()
    def forward(batch: dict[str, torch.Tensor]) -> None:
        for name, tower in pair.items():
            tower.tokens(batch[name]).cpu()

    def bare() -> None:
        torch.set_num_threads(threads)
        for batch in batches:
            forward(batch)

    lanes = ThreadPoolExecutor(os.cpu_count() or 1, initializer=partial(torch.set_num_threads, 1))

    def bare_lanes() -> None:
        list(lanes.map(forward, batches))

    @torch.inference_mode()
    def one_by_one(given: dict[str, Tower]) -> None:
        torch.set_num_threads(threads)
        for item in items:
            image = decode(item.read())
            for tower in given.values():
                tower.tokens(tower.preprocess(image)[None].to(DEVICE)).cpu()

    with tempfile.TemporaryDirectory() as folder:
        number = count()
        seconds = interleaved(
            {
                "extract": lambda: extract(source, pair, Path(folder, str(next(number))), config),
                "bare": bare,
                **({"bare, a batch a core": bare_lanes} if DEVICE == "cpu" else {}),
                "one by one": lambda: one_by_one(pair),
                "one by one, fp32": lambda: one_by_one(single),
            },
            rounds=3,
        )
    lanes.shutdown()
    torch.set_num_threads(threads)
    for case, value in seconds.items():
        print(f"  {case:<20} {IMAGES / value:8.1f} images/s on {DEVICE}")
    ratio = {case: value / seconds["extract"] for case, value in seconds.items()}
    found = [
        result("extraction/share_of_bare_forward", ratio["bare"], "x", 0.95),
        result("extraction/over_one_image_a_forward", ratio["one by one"], "x", 2),
        result("extraction/over_the_seeds_loop_fp32", ratio["one by one, fp32"], "x", 2),
    ]
    if DEVICE == "cpu":
        lane = ratio["bare, a batch a core"]
        found.append(result("extraction/share_of_bare_batch_a_core", lane, "x", 0.9))
    return found
