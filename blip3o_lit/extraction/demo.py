"""The demo's token store: scenes through the demo towers, built on first use and kept.

Nothing heavy is imported while the store is there, so that training starts at once.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from functools import partial
from pathlib import Path

from PIL import Image

from blip3o_lit.base.files import one_at_a_time
from blip3o_lit.base.home import home
from blip3o_lit.config.data import DemoConfig
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.towers import TextTowerConfig
from blip3o_lit.images.item import Item, Lost, Source, slices
from blip3o_lit.tokens.store.index import SCHEMA
from blip3o_lit.towers import scenes

SCENES = DemoConfig()
BATCH = 16
"""Small batches stay in the CPU's cache."""
VERSION = 3
"""Raised when the store holds more than before: 3 has thumbnails."""
WEIGHTS = Path(scenes.__file__).parent / "weights"


def demo_source(
    train: int = SCENES.images, validation: int = SCENES.validation_images, shard_samples: int = 256
) -> Source:
    """Return the scenes as a source of images, with captions, labels and their own split."""
    items: list[Item | Lost] = []
    for split, count in (("train", train), ("validation", validation)):
        for index in range(count):
            scene = scenes.scene(split, index)
            extra = {"label": scene.label, "scans": list(scene.scans)}
            read = partial(_draw, split, index)
            source = f"scene:{scene.key}"
            further = scenes.phrasings(scene.caption)[1:]
            items.append(Item(source, read, scene.caption, split, scene.key, extra, further))
    return Source(
        "demo",
        slices(items, shard_samples),
        split_rule="sha256 of each source scan; no scan is in both splits",
        all_split=True,
        fingerprint=f"scenes {scenes.VERSION}: {train} + {validation}",
        classes={digit: scenes.digit_prompts(digit) for digit in scenes.DIGITS},
    )


def _draw(split: str, index: int) -> Image.Image:
    return scenes.scene(split, index).image


def demo_store(
    train: int = SCENES.images,
    validation: int = SCENES.validation_images,
    masked: bool = False,
    words: bool = False,
) -> Path:
    """Return the folder of the demo's tokens, building it first where it is missing.

    The folder's name has a hash of the towers' weights and the scenes' settings, so that another
    version of either builds its own. Of two processes that come at once, one builds and the other
    waits. With `masked` the condition tower sees the left half of each scene alone; with `words`
    the states of the captions' words are kept too, of all their phrasings.
    """
    settings = f"{SCHEMA} {VERSION} {scenes.VERSION} {train} {validation} {BATCH}"
    digest = hashlib.sha256(settings.encode())
    for file in sorted(WEIGHTS.glob("*.safetensors")):
        digest.update(file.read_bytes())
    kind = "-".join(["demo", *(["masked"] if masked else []), *(["words"] if words else [])])
    name = f"{kind}-{digest.hexdigest()[:12]}"
    folder = home() / "tokens" / name
    if (folder / "index.json").is_file():
        return folder
    with one_at_a_time(folder):
        if not (folder / "index.json").is_file():
            print(f"building the demo tokens once, in {folder}", file=sys.stderr, flush=True)
            building = folder.parent / f".{name}.building"
            _build(building, demo_source(train, validation), masked, words)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(building, folder)
    return folder


def _build(folder: Path, source: Source, masked: bool, words: bool) -> None:
    import torch

    from blip3o_lit.extraction.engine import extract
    from blip3o_lit.towers import demo
    from blip3o_lit.towers.text_tower import load_text_tower

    engine = EngineConfig(batch_size=BATCH, threads=1, device="cpu")
    eva = demo.load("eva")
    towers = {"eva": demo.LeftHalf(eva) if masked else eva, "clip": demo.load("clip")}
    text = load_text_tower(TextTowerConfig("demo")) if words else None
    config = ExtractConfig(images="demo", extract=engine, captions=scenes.MOST_DIGITS)
    # Then oneDNN's fp32 kernels run, which are faster here than MKL's and as exact.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        extract(source, towers, folder, config, text)
    finally:
        torch.set_float32_matmul_precision(before)
