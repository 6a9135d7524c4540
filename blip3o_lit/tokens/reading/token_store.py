"""A token store: its shards, mapped as they are needed, and what is copied out of them.

Nothing is decoded: a batch is one tensor, and each sample's bytes are copied once, from the page
cache into their place in it. Offsets are read when a shard is first used.

Shape suffixes: B samples, N tokens, C width, K captions, L tokens of the longest caption that is
read, E width of words, R rows of several captions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.reading.packed import (
    PackedTokens,
)
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex, lengths_array
from blip3o_lit.tokens.store.int8 import load_scales, scale_array
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.tokens.store.sequences import chosen
from blip3o_lit.tokens.store.storage import TORCH_TYPES, finite

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

    def mapped(self, entry: ShardEntry, index: TokenIndex, verify: str, held: BinaryIO) -> Shard:
        """Map a shard whose open file `hold` returned; that is closed by the time it is let go."""
        ...

    def holds(self, entry: ShardEntry) -> bool:
        """Return whether a shard need not be brought; what is wrong is raised by `hold`."""
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
        with self._lock:
            if number in self._shards:
                self._shards.move_to_end(number)
                return self._shards[number]
            if self.supply is None:
                return self._mapped(number)
        held = self.supply.hold(self.index.shards[number], self._let_go)  # Others read on.
        with self._lock:
            return self._mapped(number, held)

    def _mapped(self, number: int, held: BinaryIO | None = None) -> Shard:
        """Map a shard, unless another thread has by now; `held` is its open file from a supply."""
        if number in self._shards:
            if held:
                held.close()
            return self._shards[number]
        entry = self.index.shards[number]
        verify = "size" if number in self._verified else self.verify
        if self.supply and held:
            shard = self.supply.mapped(entry, self.index, verify, held)
        else:
            shard = Shard.open(self.path, entry, self.index, verify)
        self._shards[number] = shard
        self._verified.add(number)
        if len(self._shards) > self._open_shards:
            self._shards.popitem(last=False)
        return shard

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
        marks = self._known_finite.get((shard.entry.file, array))
        if marks is None:
            marks = self._known_finite.setdefault((shard.entry.file, array), bytearray(count))
        return marks

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
