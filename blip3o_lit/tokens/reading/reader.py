"""Random access to local token shards: a memory map and an offset table per shard.

Nothing is decoded: a batch is one tensor, and each sample's bytes are copied once, from the page
cache into their place in it. Offsets are read when a shard is first used.

Shape suffixes: B samples, N tokens, C condition width, D target width, P text width.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.packed import Batch, PackedBatch, PackedTokens, restored
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.store.int8 import load_scales, scale_array
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.tokens.store.storage import TORCH_TYPES, finite
from blip3o_lit.tokens.views import view_of

OPEN_SHARDS = 64
"""Shards kept mapped; the default shuffle window is 16."""


class Place(NamedTuple):
    """The numbers of a shard in the index and of a sample in it."""

    number: int
    sample: int


class Supply(Protocol):
    """Brings shards that are not in a store's folder when it is opened."""

    address: str
    """What messages call the store."""
    limit: int
    """Bytes of shards that may be open or there; 0: any."""
    ahead: int
    """Shards that are brought before they are read."""

    def hold(self, entry: ShardEntry, let_go: Callable[[], object] = int) -> BinaryIO:
        """Return a shard's open file once it is there; `let_go` closes others of this process."""
        ...

    def mapped(
        self, entry: ShardEntry, index: TokenIndex, verify: str, let_go: Callable[[], object]
    ) -> Shard:
        """Map a shard."""
        ...

    def fetch_ahead(self, entry: ShardEntry, ended: Callable[[], bool]) -> bool:
        """Bring a shard; return False where there is no room for it now."""
        ...


class TokenStore:
    """A token store: its index, its shards as they are needed, and its heads.

    Shards lie in its folder, or where there is a `supply` come through that; the small files lie in
    the folder in either case.
    """

    def __init__(
        self,
        path: Path,
        index: TokenIndex,
        verify: str = "size",
        supply: Supply | None = None,
    ) -> None:
        self.path, self.index, self.verify, self.supply = path, index, verify, supply
        self.address = supply.address if supply else str(path)
        """What messages call it."""
        self._open_shards = OPEN_SHARDS
        if supply and supply.limit:  # An open shard is in use, and others must be there to remove.
            largest = max(shard.bytes for shard in index.shards)
            self._open_shards = max(1, min(OPEN_SHARDS, supply.limit // largest // 2))
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._verified: set[int] = set()
        self._lock = threading.RLock()
        self._known_finite: dict[tuple[str, str], bytearray] = {}
        self._scales: dict[str, np.ndarray] | None = None

    @classmethod
    def open(cls, path: Path | str, verify: str = "size") -> TokenStore:
        """Load the index of a folder.

        `verify="size"` checks a shard's size when it is first used, `full` its sha256 too.
        """
        return cls(Path(path), TokenIndex.load(path), verify)

    def shard(self, number: int) -> Shard:
        """Return a shard, mapping it if need be; safe to call from several threads."""
        entry = self.index.shards[number]
        if self.supply is not None and number not in self._shards:
            self.supply.hold(entry, self._let_go).close()  # Other threads read on meanwhile.
        with self._lock:
            if number not in self._shards:
                verify = "size" if number in self._verified else self.verify
                if self.supply is None:
                    shard = Shard.open(self.path, entry, self.index, verify)
                else:
                    shard = self.supply.mapped(entry, self.index, verify, self._let_go)
                self._shards[number] = shard
                self._verified.add(number)
                if len(self._shards) > self._open_shards:
                    self._shards.popitem(last=False)
            self._shards.move_to_end(number)
            return self._shards[number]

    def _let_go(self) -> None:
        """Unmap the shards that no batch is being read from."""
        with self._lock:
            self._shards.clear()

    def read_stored(
        self, places: list[Place], array: str, first_row: int = 0, pin: bool = False
    ) -> Tensor:
        """Copy an array of some samples as it is stored, from `first_row` on: `[B, N, C]`.

        Each sample's numbers are checked to be finite on its first read.
        """
        spec = self.index.arrays[array]
        dtype = TORCH_TYPES[spec.dtype]
        shape = (len(places), spec.shape[0] - first_row, *spec.shape[1:])
        out = torch.empty(shape, dtype=dtype, pin_memory=pin)
        numbers = (out.view(torch.int16) if dtype == torch.bfloat16 else out).numpy()
        end = spec.nbytes
        start = end // spec.shape[0] * first_row
        content = out.view(-1).view(torch.uint8).view(len(places), end - start).numpy()
        # One shard after the other: a batch may come from more of them than a cache has room for.
        for i in sorted(range(len(places)), key=lambda i: places[i].number):
            number, sample = places[i]
            shard = self.shard(number)
            np.copyto(content[i], shard.content(array, sample, start, end))
            unread = bytearray(shard.entry.samples)
            known = self._known_finite.setdefault((shard.entry.file, array), unread)
            if not known[sample] and not finite(numbers[i], spec.dtype):
                where = f"sample {shard.key(sample)} in {self.address}/{shard.entry.file}"
                raise UserError(
                    f"{where}: {array} holds NaN or infinity; extract it again or drop it (doctor "
                    "lists all)"
                )
            known[sample] = True
        return out

    def read_packed(
        self, places: list[Place], array: str, first_row: int = 0, pin: bool = False
    ) -> Tensor | PackedTokens:
        """Copy as `read_stored` does; int8 tokens get their scales."""
        spec = self.index.arrays[array]
        stored_BNC = self.read_stored(places, array, first_row, pin)
        if spec.dtype != "int8":
            return stored_BNC
        if self._scales is None:
            self._scales = load_scales(self.path, self.index.arrays)
        scale_KC = torch.from_numpy(self._scales[array][first_row : int(spec.cls) + 1])
        token_BN = None
        if spec.scale == "token":
            token_BN = self.read_stored(places, scale_array(array), first_row, pin)
        return PackedTokens(stored_BNC, scale_KC.pin_memory() if pin else scale_KC, token_BN)

    def read(self, places: list[Place], array: str, first_row: int = 0) -> Tensor:
        """Copy as `read_stored` does; int8 tokens are restored to fp16."""
        tokens = self.read_packed(places, array, first_row)
        return tokens.restore() if isinstance(tokens, PackedTokens) else tokens

    def head(self, array: str) -> Head:
        return Head.load(self.path, array, self.index.arrays[array].normed)


class TokenReader:
    """One split of a store, its sample ids counted from 0 in shard order.

    `condition` and `target` are names of arrays. The mode is patch_only when left out; at most
    `max_shards` shards and `limit` samples are read.
    """

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
        self.store, self.index, self.split = store, store.index, split
        self.mode, self.limits = mode or ModeConfig(), (max_shards, limit)
        self.array_names = self.condition, self.target = condition, target
        index = self.index
        one_of("split", split, index.splits)
        one_of("data.condition", condition, index.arrays)
        one_of("data.target", target, index.arrays)
        self.views = {
            side: view_of(array, index.arrays[array], self.mode, index.reduced, store.head)
            for side, array in (("condition", condition), ("target", target))
        }
        self.shape = PairShape(self.views["condition"].shape, self.views["target"].shape)
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
        """Stored bytes of one pair."""
        return sum(self.index.arrays[name].nbytes for name in self.array_names)

    def viewed(self, condition: str, target: str, mode: ModeConfig) -> TokenReader:
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
        """Read a batch: `read_packed` with int8 tokens restored to fp16."""
        return restored(self.read_packed(ids))

    def read_packed(self, ids: np.ndarray, pin: bool = False) -> PackedBatch:
        """Read a batch whose int8 tokens are restored later, on the device.

        Ids `[B]` come in any order, repeats allowed. `condition` `[B, N, C]` and `target`
        `[B, N, D]` are as stored, or fp32 when the mode averages or projects; with `pin` they lie
        in page-locked memory.
        """
        places = self._locate(ids)
        out: PackedBatch = {}
        for (side, view), array in zip(self.views.items(), self.array_names):
            if view.computes:
                tokens = view.compute(self.store.read(places, array, view.first))
                out[side] = tokens.pin_memory() if pin else tokens
            else:
                out[side] = self.store.read_packed(places, array, view.first, pin)
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
