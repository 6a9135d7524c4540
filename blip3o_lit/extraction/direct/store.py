"""Pictures and towers in the place of a token store: the same readers, ids and views.

Shape suffixes: B images, N tokens, C channels, S side of the input.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.towers import TowersConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.extraction.direct.listing import Listing, PictureShard
from blip3o_lit.extraction.encoding import WORDS, TowerSet
from blip3o_lit.images.item import Reject, Source, decode
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.reading.packed import Batch, PackedBatch
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.sequences import sequence_specs
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.text_tower import load_text_tower

SHARD_IMAGES = 256
"""Images of a shard, as an extraction makes them by default: the order depends on it."""
PIXELS = "pixels."
"""Begins the keys of a batch that hold inputs of towers."""
SIDES = (("eva", "condition"), ("clip", "target"))


def load_pair(towers: TowersConfig, device: str) -> dict[str, torch.nn.Module]:
    return {
        name: load_tower(getattr(towers, side), towers.pretrained, device) for name, side in SIDES
    }


def pictures_of(config: TrainConfig) -> Source:
    """Return the source that `data.images` names."""
    data = config.data
    if data.images == "demo":
        from blip3o_lit.extraction.demo import demo_source

        demo = data.demo
        return demo_source(demo.images, demo.validation_images, SHARD_IMAGES)
    return open_source(data.images or "", SHARD_IMAGES, config.split.file, data.keep)


class PictureStore:
    """What readers ask of a store: an index, shards and heads; the towers are loaded when needed.

    With `real=False` nothing is decoded and no weights are read; splits are then of the size that
    `split.fraction` asks for.
    """

    def __init__(
        self, config: TrainConfig, device: str, real: bool = True, ranks: FirstRank = ALONE
    ) -> None:
        self.config, self.device = config, device
        self.path, self.supply = Path(config.data.images or ""), None
        self.address = str(self.path)
        self.listing = Listing(pictures_of(config), config.split, config.pixels, SHARD_IMAGES)
        changes = config.pixels.changes()
        shapes = load_pair(config.towers, "meta")
        plain = TowerSet(shapes, False, "float32", device="meta", pixels=changes)  # type: ignore[arg-type]
        self.shapes = plain
        self.shards: list[PictureShard] = []
        if real:
            self.shards = self.listing.shards(config.data.threads, ranks)
            entries = [self._entry(number) for number in range(len(self.shards))]
        else:
            entries = self._estimated()
        rule = self.listing.source.split_rule
        self.index = TokenIndex(plain.arrays | self._words(real), entries, split_rule=rule)

    def _words(self, real: bool) -> dict[str, ArraySpec]:
        """Return the specs of captions' words, where the condition has them: for a plan alone."""
        towers, condition = self.config.towers, self.config.data.condition
        if WORDS not in names_of(condition):
            return {}
        if real or towers.text.kind is None:
            raise UserError(
                f"data=images with data.condition={condition}: captions are not encoded on the "
                "fly: extract with towers.text.kind=KIND and train on data=tokens"
            )
        info = load_text_tower(towers.text, towers.pretrained, "meta").info
        return sequence_specs(WORDS, info.longest, info.width, 1, tower=info.name)

    def _entry(self, number: int) -> ShardEntry:
        shard = self.shards[number]
        texts = [self.listing.hash, *(f"{item.source}\n{item.caption}" for item in shard.items)]
        digest = hashlib.sha256("\n".join(texts).encode(errors="replace")).hexdigest()
        return ShardEntry(f"{shard.split}-{number}", "", shard.split, len(shard.items), 1, digest)

    def _estimated(self) -> list[ShardEntry]:
        images, split = self.listing.images, self.config.split
        held_out = round(images * split.fraction)
        if self.listing.source.all_split:
            items = (item for part in self.listing.parts for item in part.items)
            held_out = sum(getattr(item, "split", "") != "train" for item in items)
        parts = {"train": images - held_out, "validation": held_out}
        return [ShardEntry(split, "", split, n, 1, "") for split, n in parts.items() if n]

    def shard(self, number: int) -> PictureShard:
        return self.shards[number]

    def head(self, array: str) -> Head:
        """Return a tower's head; that of the shapes where the weights are not needed yet."""
        towers = self.towers.towers if self.shards else self.shapes.towers
        tensors, facts = towers[array].heads()
        if "projection" not in tensors:
            raise UserError(f"{array} has no projection: set mode.projected=false")
        return Head(tensors, facts, towers[array].info.normed).to(self.device)

    @cached_property
    def towers(self) -> TowerSet:
        """The towers with their weights, on the device."""
        pair, changes = load_pair(self.config.towers, self.device), self.config.pixels.changes()
        return TowerSet(pair, False, "float32", device=self.device, pixels=changes)  # type: ignore[arg-type]


class PictureReader(TokenReader):
    """One split of a source of pictures; batches hold inputs of the towers, or their tokens."""

    store: PictureStore  # type: ignore[assignment]

    def __init__(
        self,
        store: PictureStore,
        split: str,
        condition: str | Sequence[str] = "eva",
        target: str = "clip",
        mode: ModeConfig | None = None,
        max_shards: int | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__(store, split, condition, target, mode, max_shards, limit)  # type: ignore[arg-type]

    @property
    def mean_length(self) -> float:
        """The longest caption's: how long they are is known once they are encoded."""
        return float(self.shape.words.longest) if self.shape.words else 0.0

    def viewed(self, condition: str | Sequence[str], target: str, mode: ModeConfig) -> TokenReader:
        return PictureReader(self.store, self.split, condition, target, mode)

    def read_packed(self, ids: np.ndarray, pin: bool = False) -> PackedBatch:
        """Decode pictures and prepare them for the towers; returns `[B, 3, S, S]` by input."""
        inputs = []
        pixels, name = self.store.config.pixels, self.store.config.data.images
        for number, sample in self._locate(ids):
            item = self.store.shard(number).items[sample]
            try:
                inputs.append(self.store.towers.prepare(decode(item.read(), pixels)))
            except Reject as error:
                raise UserError(
                    f"data.images={name}: {item.source} can't be read any more ({error}): restore "
                    "it, or start a new run"
                ) from error
        out: PackedBatch = {}
        for key in inputs[0]:
            stacked = torch.stack([sample[key] for sample in inputs])
            out[PIXELS + key] = stacked.pin_memory() if pin else stacked
        return out

    def read(self, ids: np.ndarray) -> Batch:
        """Read a batch of tokens, on the CPU."""
        batch = self.encode(self.read_packed(ids))  # type: ignore[arg-type]
        return {side: tokens.cpu() for side, tokens in batch.items()}

    def text(self, ids: np.ndarray) -> Tensor | None:
        return None

    @torch.no_grad()
    def encode(self, batch: Batch) -> Batch:
        """Put the inputs in a batch through the towers and views, a part of them at a time."""
        pixels = {k.removeprefix(PIXELS): v for k, v in batch.items() if k.startswith(PIXELS)}
        out = {k: v for k, v in batch.items() if not k.startswith(PIXELS)}
        towers = self.store.towers
        count = len(next(iter(pixels.values())))
        size = self.store.config.data.tower_batch or count
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # the run's own word is not the towers'
        try:
            parts: dict[str, list[Tensor]] = {side: [] for side in self.views}
            for start in range(0, count, size):
                piece = {k: v[start : start + size].to(towers.device) for k, v in pixels.items()}
                tokens = towers.tokens_of(piece)
                for (side, view), array in zip(self.views.items(), self.array_names):
                    tokens_BNC = tokens[array][:, view.first :]
                    parts[side].append(view.compute(tokens_BNC) if view.computes else tokens_BNC)
        finally:
            torch.set_float32_matmul_precision(before)
        return out | {side: torch.cat(pieces) for side, pieces in parts.items()}
