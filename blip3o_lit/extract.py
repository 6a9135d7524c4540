"""Images -> token shards: `python -m blip3o_lit.extract images=SRC towers=NAME out=DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from blip3o_lit.base.words import pasteable
from blip3o_lit.cli.command import TOKENS_KEPT, run_command
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig

if TYPE_CHECKING:
    from blip3o_lit.images.item import Source
    from blip3o_lit.tokens.store.index import TokenIndex
    from blip3o_lit.towers.text_tower import TextTower

NAMED = 4
"""Things beside the images that are named one by one."""


def extract(config: ExtractConfig) -> None:
    """Extract, then say what the store holds and how to train on it."""
    if config.dry_run:
        _print_price(config)
        return
    if not config.images:
        raise UserError("images=SRC is missing: a folder, tars, a .csv or .jsonl, or demo")
    if not config.out:
        raise UserError("out=DIR is missing: the folder of the token store")
    from blip3o_lit.extraction.engine import Extraction, device_of, worker_of
    from blip3o_lit.towers.load import load_tower

    worker, workers = worker_of(config.extract.shard)
    device = device_of(config.extract.device)
    source = _source(config)
    towers = {
        "eva": load_tower(config.towers.condition, config.towers.pretrained, device),
        "clip": load_tower(config.towers.target, config.towers.pretrained, device),
    }
    words = text_tower(config, device)
    out = Path(config.out).expanduser()
    print(f"{config.images}: {_counts(source)}; worker {worker} of {workers}")
    for line in _few([f"{entry.source}: {entry.reason}" for entry in source.beside]):
        print(f"  {line}")
    for name, tower in towers.items():
        print(f"{name}: {tower.info.name} on {device}")
    if words is not None:
        print(f"words: {words.info.name}, {config.captions} captions of an image at most")
    outcome = Extraction(source, towers, out, config, words).run()
    if outcome.index is None:
        print(f"{out}: this worker's part is done; the last worker writes index.json")
        return
    print(f"{out}" + (" (was complete already)" if outcome.already else ""))
    if config.append:
        print(f"  {'appended':<20}{outcome.added:,} samples")
    rate = outcome.images / outcome.seconds if outcome.seconds else 0.0
    read = f"{outcome.images:,} in {outcome.seconds:,.0f} s, {rate:,.1f}/s"
    for name, value in [("images read now", read), *_rows(outcome.index, out)]:
        print(f"  {name:<20}{value}")
    if len(outcome.index.splits) < 2:
        print("one split alone: set split.fraction or split.seed anew, training scores on another")
    words = ["data=tokens", pasteable("data.tokens", config.out)]
    words += ["mode=grid_64"] if outcome.index.reduced else []
    print("next: python -m blip3o_lit.train", *words)


def text_tower(config: ExtractConfig, device: str) -> TextTower | None:
    """Return the tower of the captions' words; None where none are kept."""
    from blip3o_lit.towers.text_tower import load_text_tower

    text = config.towers.text
    return load_text_tower(text, config.towers.pretrained, device) if text.kind else None


def _source(config: ExtractConfig) -> Source:
    from blip3o_lit.extraction.demo import demo_source
    from blip3o_lit.images.open import open_source

    size = config.extract.shard_samples
    if config.images == "demo":
        return demo_source(shard_samples=size)
    return open_source(config.images or "", size, config.split.file, config.out)


def _counts(source: Source) -> str:
    """Return how many images and captions a source lists, and how many tars."""
    from blip3o_lit.images.item import Item

    loose = [entry for part in source.parts if part.length is not None for entry in part.entries()]
    captions = sum(isinstance(entry, Item) and bool(entry.caption) for entry in loose)
    tars = sum(part.length is None for part in source.parts)
    counts = [f"{len(loose):,} images, {captions:,} with a caption"] if loose else []
    return " and ".join(counts + ([f"{tars:,} tars"] if tars else []))


def _rows(index: TokenIndex, out: Path) -> list[tuple[str, str]]:
    """Return what a store holds, what became of every image, and what was no image."""
    with open(out / "rejects.jsonl", encoding="utf-8") as file:
        entries = [json.loads(line) for line in file]
    beside = [f"{e['source']}: {e['reason']}" for e in entries if not e["image"]]
    images = index.samples + index.rejects
    where = f", see {out / 'rejects.jsonl'}" if entries else ""
    size = sum(shard.bytes for shard in index.shards) / 1e9
    rows = [(f"{split} samples", f"{count:,}") for split, count in sorted(index.splits.items())]
    rows += [
        ("images given", f"{images:,}: {index.samples:,} stored, {index.rejects:,} rejected"),
        ("rejects", f"{index.rejects:,} images{where}"),
    ]
    rows += [("beside the images", line) for line in _few(beside)]
    rows += [("shards", f"{len(index.shards):,}, {size:.2f} GB"), ("split", index.split_rule)]
    for name, spec in index.arrays.items():
        if spec.cosine is not None:
            rows.append((f"{name} in int8", f"mean cosine {spec.cosine:.6f} to its true tokens"))
    return rows


def _few(lines: list[str]) -> list[str]:
    more = len(lines) - NAMED
    return lines[:NAMED] + ([f"and {more:,} more"] if more > 0 else [])


def _print_price(config: ExtractConfig) -> None:
    from blip3o_lit.extraction.price import IMAGES, price
    from blip3o_lit.images.open import open_source

    images = IMAGES
    if config.images and config.images != "demo":
        images = open_source(config.images, 1, config.split.file, config.out).length or IMAGES
    for name, value in price(config, images):
        print(f"  {name:<26}{value}")


def main() -> None:
    run_command("extract", ExtractConfig, extract, TOKENS_KEPT)


if __name__ == "__main__":
    main()
