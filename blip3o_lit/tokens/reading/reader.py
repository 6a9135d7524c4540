"""Random access to local token shards: a memory map and an offset table per shard.

Nothing is decoded: a batch is one tensor, and each sample's bytes are copied once, from the page
cache into their place in it. Offsets are read when a shard is first used.

Shape suffixes: B samples, N tokens, C condition width, D target width, P text width, K captions,
L tokens of the longest caption that is read, E width of words, R rows of several captions.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.shape import PairShape, SequenceShape
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.packed import (
    LENGTH,
    WORDS,
    Batch,
    PackedBatch,
    PackedTokens,
    restored,
)
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex, lengths_array
from blip3o_lit.tokens.store.int8 import load_scales, scale_array
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.tokens.store.sequences import chosen
from blip3o_lit.tokens.store.storage import TORCH_TYPES, finite
from blip3o_lit.tokens.views import sides_of, view_of

MEASURED = 4
"""Shards whose captions' lengths say how long the captions of a split are."""
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
            known = self._known(shard, array, shard.entry.samples)
            if not known[sample]:
                self._check_finite(shard, array, sample, numbers[i])
                known[sample] = True
        return out

    def _known(self, shard: Shard, array: str, count: int) -> bytearray:
        """Return the marks of what is known to be finite, which the caller sets."""
        return self._known_finite.setdefault((shard.entry.file, array), bytearray(count))

    def _check_finite(self, shard: Shard, array: str, sample: int, numbers: np.ndarray) -> None:
        if not finite(numbers, self.index.arrays[array].dtype):
            where = f"sample {shard.key(sample)} in {self.address}/{shard.entry.file}"
            raise UserError(
                f"{where}: {array} holds NaN or infinity; extract it again or drop it (doctor "
                "lists all)"
            )

    def read_words(
        self,
        places: list[Place],
        array: str,
        draw_B: np.ndarray | None = None,
        pin: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Copy one caption of each sample: words `[B, L, E]`, zeros behind each, lengths `[B]`.

        `draw_B`, from 0 to 1, says which of an image's captions it is; None: the first. L is the
        longest of those; an image without captions has length 0. First reads are checked.
        """
        spec = self.index.arrays[array]
        number_B, sample_B = np.array(places, np.int64).reshape(-1, 2).T
        caption_B, start_B, length_B = np.zeros((3, len(places)), np.int64)
        most = self.index.arrays[lengths_array(array)].shape[0]
        for number in np.unique(number_B).tolist():
            own = number_B == number
            lengths_BK = self.shard(number).lengths(array)[sample_B[own]]
            found = chosen(lengths_BK, draw_B if draw_B is None else draw_B[own])
            caption_B[own], start_B[own], length_B[own] = found
        shape = (len(places), max(1, int(length_B.max(initial=0))), spec.shape[1])
        out = torch.empty(shape, dtype=TORCH_TYPES[spec.dtype], pin_memory=pin)
        numbers = (out.view(torch.int16) if out.dtype == torch.bfloat16 else out).numpy()
        content = out.view(-1).view(torch.uint8).view(len(places), -1).numpy()
        size = spec.row_bytes
        wanted = np.stack((caption_B, start_B * size, length_B * size), 1).tolist()
        for i in np.argsort(number_B, kind="stable").tolist():
            (number, sample), (caption, start, length) = places[i], wanted[i]
            shard = self.shard(number)
            content[i, :length] = shard.content(array, sample, start, start + length)
            content[i, length:] = 0
            known = self._known(shard, array, shard.entry.samples * most)
            if not known[sample * most + caption]:
                self._check_finite(shard, array, sample, numbers[i])
                known[sample * most + caption] = True
        return out, torch.from_numpy(length_B)

    def read_captions(self, place: Place, array: str) -> tuple[Tensor, np.ndarray]:
        """Return all captions of a sample, one after the other `[R, E]`, and their lengths."""
        spec, shard = self.index.arrays[array], self.shard(place.number)
        stored = shard.stored(array, spec, place.sample)
        self._check_finite(shard, array, place.sample, stored)
        words_RE = torch.from_numpy(stored.copy()).view(TORCH_TYPES[spec.dtype])
        return words_RE, shard.lengths(array)[place.sample]

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
