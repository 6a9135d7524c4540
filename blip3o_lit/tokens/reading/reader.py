"""Random access to local token shards: a memory map and an offset table a shard.

Nothing is decoded: a batch is one tensor, and each sample's bytes are copied once, from the page
cache into their place in it. Offsets are read when a shard is first used.

Shape suffixes: B samples, N tokens, C condition width, D target width, P text width.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.packed import PackedBatch, PackedTokens, restored
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.tokens.store.storage import TORCH_TYPES, finite, load_scales, scale_array
from blip3o_lit.tokens.views import pair_of_views

OPEN_SHARDS = 64
"""Shards kept mapped; the default shuffle window is 16."""


class Place(NamedTuple):
    """Where a sample is."""

    shard: Shard
    number: int
    """The shard's number in the index."""
    sample: int
    """The sample's number in the shard."""


class TokenStore:
    """A local token store: its index, its shards as they are needed, and its heads."""

    def __init__(self, path: Path, index: TokenIndex, verify: str = "size") -> None:
        self.path, self.index, self.verify = path, index, verify
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.Lock()
        self._finite: dict[tuple[int, str], bytearray] = {}
        self._scales: dict[str, np.ndarray] | None = None

    @classmethod
    def open(cls, path: Path | str, verify: str = "size") -> TokenStore:
        """Load the index of a folder.

        `verify="size"` checks a shard's size when it is first used, `full` its sha256 too.

        Raises:
            UserError: If there is no readable store.
        """
        return cls(Path(path), TokenIndex.load(path), verify)

    def shard(self, number: int) -> Shard:
        """Return a shard, mapping it if need be; safe to call from several threads."""
        with self._lock:
            shard = self._shards.get(number)
            if shard is None:
                verify = "size" if number in self._verified else self.verify
                entry = self.index.shards[number]
                shard = Shard.open(self.path, entry, self.index.arrays, verify)
                self._verified.add(number)
                self._shards[number] = shard
                if len(self._shards) > OPEN_SHARDS:
                    self._shards.popitem(last=False)
            else:
                self._shards.move_to_end(number)
            return shard

    def stored(self, located: list[Place], array: str, first: int = 0, pin: bool = False) -> Tensor:
        """Copy an array of some samples as it is stored, from row `first` on: `[B, N, C]`.

        Raises:
            UserError: If a stored number is not finite; each sample is checked on its first read.
        """
        spec = self.index.arrays[array]
        dtype = TORCH_TYPES[spec.dtype]
        shape = (len(located), spec.shape[0] - first, *spec.shape[1:])
        out = torch.empty(shape, dtype=dtype, pin_memory=pin)
        flat = (out.view(torch.int16) if dtype == torch.bfloat16 else out).numpy()
        end = spec.nbytes
        start = end // spec.shape[0] * first
        content = out.view(-1).view(torch.uint8).view(len(located), end - start).numpy()
        for i, place in enumerate(located):
            np.copyto(content[i], place.shard.content(array, place.sample, start, end))
            unread = bytearray(place.shard.entry.samples)
            known = self._finite.setdefault((place.number, array), unread)
            if not known[place.sample] and not finite(flat[i], spec.dtype):
                raise UserError(
                    f"sample {place.shard.key(place.sample)} in "
                    f"{self.path / place.shard.entry.file}: {array} holds NaN or infinity; "
                    "extract it again or drop it (doctor lists all)"
                )
            known[place.sample] = True
        return out

    def packed(
        self, located: list[Place], array: str, first: int = 0, pin: bool = False
    ) -> Tensor | PackedTokens:
        """Copy as `stored` does; int8 tokens get their scales."""
        spec = self.index.arrays[array]
        stored_BNC = self.stored(located, array, first, pin)
        if spec.dtype != "int8":
            return stored_BNC
        if self._scales is None:
            self._scales = load_scales(self.path, self.index.arrays)
        scale_KC = torch.from_numpy(self._scales[array][first : int(spec.cls) + 1])
        by_token = spec.scale == "token"
        token_BN = self.stored(located, scale_array(array), first, pin) if by_token else None
        return PackedTokens(stored_BNC, scale_KC.pin_memory() if pin else scale_KC, token_BN)

    def gather(self, located: list[Place], array: str, first: int = 0) -> Tensor:
        """Copy as `stored` does; int8 tokens are restored to fp16."""
        tokens = self.packed(located, array, first)
        return tokens.restore() if isinstance(tokens, PackedTokens) else tokens

    def head(self, array: str) -> Head:
        return Head.load(self.path, array, self.index.arrays[array].normed)


def view_hash(
    index: TokenIndex,
    split: str,
    sides: tuple[str, str],
    mode: ModeConfig,
    limits: tuple[int | None, int | None],
) -> str:
    """Hash all that decides which numbers a reader gives for an id."""
    parts = [index.hash, split, *sides, mode.name, mode.projected, *limits]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class TokenReader:
    """One split of a store, seen through one mode; sample ids count from 0 in shard order."""

    def __init__(
        self,
        store: TokenStore,
        split: str,
        condition: str = "eva",
        target: str = "clip",
        mode: ModeConfig | None = None,
        max_shards: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Choose the split's shards and the view of both arrays; opens no shard.

        `condition` and `target` are names of arrays. The mode is patch_only when left out; at most
        `max_shards` shards and `limit` samples are read.

        Raises:
            UserError: If the store has no such split or array, or can't give the view.
        """
        mode = mode or ModeConfig()
        index = store.index
        self.store, self.split, self.mode = store, split, mode
        self.condition, self.target = condition, target
        self._views = pair_of_views(index, split, condition, target, mode, store.head)
        self._text = next((n for n, s in index.arrays.items() if s.kind == "text"), None)
        numbers = [i for i, shard in enumerate(index.shards) if shard.split == split][:max_shards]
        ends = np.cumsum([index.shards[i].samples for i in numbers])
        total = int(ends[-1]) if limit is None else min(limit, int(ends[-1]))
        count = int(np.searchsorted(ends, total)) + 1
        self._numbers = np.array(numbers[:count])
        self._starts = np.concatenate([[0], ends[: count - 1]])
        self.shard_sizes = np.diff(np.append(self._starts, total))
        self._total, self._limits = total, (max_shards, limit)

    def __len__(self) -> int:
        return self._total

    @property
    def shape(self) -> PairShape:
        """Token shapes of both sides, as the mode gives them."""
        return PairShape(self._views["condition"].shape, self._views["target"].shape)

    @property
    def content_hash(self) -> str:
        """Hash of all that decides what `read` returns."""
        sides = (self.condition, self.target)
        return view_hash(self.store.index, self.split, sides, self.mode, self._limits)

    def _locate(self, ids: np.ndarray) -> list[Place]:
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self._total:
            raise IndexError(f"sample ids must be in 0..{self._total - 1}")
        places = np.searchsorted(self._starts, ids, "right") - 1
        opened = {int(p): self.store.shard(int(self._numbers[p])) for p in np.unique(places)}
        local = ids - self._starts[places]
        return [
            Place(opened[p], int(self._numbers[p]), i)
            for p, i in zip(places.tolist(), local.tolist())
        ]

    def read(self, ids: np.ndarray) -> dict[str, Tensor]:
        """Read a batch: `read_packed` with int8 tokens restored to fp16."""
        return restored(self.read_packed(ids))

    def read_packed(self, ids: np.ndarray, pin: bool = False) -> PackedBatch:
        """Read a batch whose int8 tokens are restored later, on the device.

        Ids `[B]` come in any order, repeats allowed. `condition` `[B, N, C]` and `target`
        `[B, N, D]` are as stored, or fp32 when the mode averages or projects; with `pin` they lie
        in page-locked memory.

        Raises:
            UserError: If a shard is damaged, or a token is not finite.
        """
        located = self._locate(ids)
        out: PackedBatch = {}
        for side, array in (("condition", self.condition), ("target", self.target)):
            view = self._views[side]
            if view.computes:
                tokens = view.compute(self.store.gather(located, array, view.first))
                out[side] = tokens.pin_memory() if pin else tokens
            else:
                out[side] = self.store.packed(located, array, view.first, pin)
        return out

    def text(self, ids: np.ndarray) -> Tensor | None:
        """Return caption embeddings `[B, P]` in fp32, or None when the store has none."""
        if self._text is None:
            return None
        return self.store.gather(self._locate(ids), self._text).float()

    def metadata(self, ids: np.ndarray) -> list[dict[str, Any]]:
        return [place.shard.metadata(place.sample) for place in self._locate(ids)]

    def captions(self, ids: np.ndarray) -> list[str]:
        return [str(item.get("caption", "")) for item in self.metadata(ids)]

    def keys(self, ids: np.ndarray) -> list[str]:
        return [place.shard.key(place.sample) for place in self._locate(ids)]
