"""Random access to one split of a token store, by sample ids, in one view.

Shape suffixes: B samples, N tokens, C condition width, D target width, P text width, L tokens of
the longest caption that is read, E width of words, R rows of several captions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.shape import PairShape, SequenceShape
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.errors import one_of
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.packed import (
    LENGTH,
    WORDS,
    Batch,
    PackedBatch,
    restored,
)
from blip3o_lit.tokens.reading.token_store import Place, Supply, TokenStore
from blip3o_lit.tokens.store.index import ShardEntry
from blip3o_lit.tokens.views import sides_of, view_of

MEASURED = 4
"""Shards whose captions' lengths say how long the captions of a split are."""


class TokenReader:
    """One split of a store, its sample ids counted from 0 in shard order.

    `condition` and `target` are names of arrays; a condition may be a grid, a sequence (words) or
    both. The mode, which is of grids, is patch_only when left out; at most `max_shards` shards and
    `limit` samples are read.
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        condition: str | Sequence[str] = "eva",
        target: str = "clip",
        mode: ModeConfig | None = None,
        max_shards: int | None = None,
        limit: int | None = None,
    ) -> None:
        self.store, self.index, self.split = store, store.index, split
        self.mode, self.limits = mode or ModeConfig(), (max_shards, limit)
        index = self.index
        one_of("split", split, index.splits)
        self.grid, self.words = sides_of(names_of(condition), index.arrays)
        one_of("data.target", target, index.arrays)
        self.target = target
        self.array_names = (*filter(None, (self.grid, self.words)), target)
        self.views = {
            side: view_of(array, index.arrays[array], self.mode, index.reduced, store.head)
            for side, array in (("condition", self.grid), ("target", target))
            if array
        }
        grid = self.views["condition"].shape if self.grid else None
        words = SequenceShape(*index.arrays[self.words].shape) if self.words else None
        self.shape = PairShape(grid, self.views["target"].shape, words)
        self._text = next((n for n, s in index.arrays.items() if s.kind == "text"), None)
        numbers = [i for i, shard in enumerate(index.shards) if shard.split == split][:max_shards]
        sizes = np.array([index.shards[i].samples for i in numbers])
        starts = np.cumsum(sizes) - sizes
        if limit is not None:
            sizes = np.clip(limit - starts, 0, sizes)
        used = sizes > 0
        self.shard_sizes = sizes[used]
        self._shard_numbers, self._first_ids = np.array(numbers)[used], starts[used]

    def __len__(self) -> int:
        return int(self.shard_sizes.sum())

    @property
    def content_hash(self) -> str:
        """Hash of all that decides which numbers a reader gives for an id."""
        mode = (self.mode.name, self.mode.projected)
        parts = [self.index.hash, self.split, *self.array_names, *mode, *self.limits]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def sample_bytes(self) -> int:
        """Stored bytes of one pair; of words, those of a caption of mean length."""
        arrays = self.index.arrays
        grids = sum(arrays[name].nbytes for name in self.array_names if name != self.words)
        return grids + (int(self.mean_length * arrays[self.words].row_bytes) if self.words else 0)

    @cached_property
    def mean_length(self) -> float:
        """Mean length of the captions in a few shards all over the split, of a store with words."""
        assert self.words
        few = np.unique(np.linspace(0, len(self._shard_numbers) - 1, MEASURED).astype(int))
        shards = [self.store.shard(number) for number in self._shard_numbers[few].tolist()]
        lengths = np.concatenate([shard.lengths(self.words).reshape(-1) for shard in shards])
        return float(lengths.sum() / max(1, (lengths > 0).sum()))

    def viewed(self, condition: str | Sequence[str], target: str, mode: ModeConfig) -> TokenReader:
        """Return another view of the same split, all of it."""
        return TokenReader(self.store, self.split, condition, target, mode)

    def _locate(self, ids: np.ndarray) -> list[Place]:
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample ids must be in 0..{len(self) - 1}")
        own = np.searchsorted(self._first_ids, ids, "right") - 1
        numbers, samples = self._shard_numbers[own], ids - self._first_ids[own]
        return [Place(*place) for place in zip(numbers.tolist(), samples.tolist())]

    def read(self, ids: np.ndarray) -> Batch:
        """Read a batch: `read_packed` with int8 tokens restored to fp16, first captions."""
        return restored(self.read_packed(ids))

    def read_packed(
        self, ids: np.ndarray, pin: bool = False, draw_B: np.ndarray | None = None
    ) -> PackedBatch:
        """Read a batch whose int8 tokens are restored later, on the device.

        Ids `[B]` come in any order, repeats allowed. `condition` `[B, N, C]` and `target`
        `[B, N, D]` are as stored, or fp32 when the mode averages or projects; with `pin` they lie
        in page-locked memory. Words, with their lengths, are those of one caption of each image,
        as `TokenStore.read_words` says.
        """
        places = self._locate(ids)
        out = self._read_grids(places, pin)
        if self.words:
            out[WORDS], out[LENGTH] = self.store.read_words(places, self.words, draw_B, pin)
        return out

    def _read_grids(self, places: list[Place], pin: bool = False) -> PackedBatch:
        out: PackedBatch = {}
        for side, view in self.views.items():
            array = self.target if side == "target" else str(self.grid)
            if view.computes:
                tokens = view.compute(self.store.read(places, array, view.first))
                out[side] = tokens.pin_memory() if pin else tokens
            else:
                out[side] = self.store.read_packed(places, array, view.first, pin)
        return out

    def read_all(self, ids: np.ndarray) -> Batch:
        """Read grids, and the words of all captions of the images, one after the other `[R, E]`."""
        places = self._locate(ids)
        out = restored(self._read_grids(places))
        if self.words:
            out[WORDS] = torch.cat([self.store.read_captions(p, self.words)[0] for p in places])
        return out

    def text(self, ids: np.ndarray) -> Tensor | None:
        """Return caption embeddings `[B, P]` in fp32, or None when the store has none."""
        if self._text is None:
            return None
        return self.store.read(self._locate(ids), self._text).float()

    def metadata(self, ids: np.ndarray) -> list[dict[str, Any]]:
        return [self.store.shard(n).metadata(sample) for n, sample in self._locate(ids)]

    def thumbnails(self, ids: np.ndarray) -> list[bytes]:
        """Return the JPEGs of samples, of a store whose index says that it has them."""
        return [self.store.shard(n).thumbnail(sample) for n, sample in self._locate(ids)]

    def captions(self, ids: np.ndarray) -> list[str]:
        return [str(item.get("caption", "")) for item in self.metadata(ids)]

    @property
    def supplies(self) -> list[Supply]:
        """What shards come through; nothing for a store that is there."""
        return [self.store.supply] if self.store.supply else []

    def fetches(self, ids: np.ndarray) -> list[tuple[Supply, ShardEntry]]:
        """Return the shards that samples lie in, each with what it comes through."""
        places = np.unique(np.searchsorted(self._first_ids, ids, "right") - 1)
        entries = [self.store.index.shards[number] for number in self._shard_numbers[places]]
        return [(supply, entry) for supply in self.supplies for entry in entries]

    def keys(self, ids: np.ndarray) -> list[str]:
        return [self.store.shard(n).key(sample) for n, sample in self._locate(ids)]
