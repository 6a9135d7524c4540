"""Several stores read as one: their samples side by side, and how often each comes in an epoch.

An epoch has as many samples as the stores together. Without weights each comes once; with weights a
store has its share of them, by largest remainder.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.packed import PackedBatch, PackedTokens
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import Supply, TokenStore
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex

T = TypeVar("T")


class MixedStore:
    """What the stores of a mixture have in common; classes and heads are the first one's."""

    def __init__(self, stores: list[TokenStore]) -> None:
        self.path, self.address = stores[0].path, stores[0].address
        self._first = stores[0]
        shards = [shard for store in stores for shard in store.index.shards]
        thumbnails = all(store.index.thumbnails for store in stores)
        arrays = dict(stores[0].index.arrays)
        for store in stores[1:]:
            arrays = {name: spec for name, spec in arrays.items() if name in store.index.arrays}
        self.index: TokenIndex = replace(
            stores[0].index, arrays=arrays, shards=shards, thumbnails=thumbnails
        )

    def head(self, array: str) -> Head:
        return self._first.head(array)


class MixedReader(TokenReader):
    """Readers of several stores as one, their ids one after another."""

    def __init__(
        self, readers: list[TokenReader], names: list[str], weights: list[float] | None = None
    ) -> None:
        first = readers[0]
        self.readers, self.names, self.weights = readers, names, weights
        self.store = MixedStore([reader.store for reader in readers])  # type: ignore[assignment]
        self.index, self.split, self.mode = self.store.index, first.split, first.mode
        self.array_names, self.limits, self.views = first.array_names, first.limits, first.views
        self.grid, self.words, self.target = first.grid, first.words, first.target
        self.shape = first.shape
        if first.shape.words:
            longest = max(reader.shape.words.longest for reader in readers if reader.shape.words)
            words = replace(first.shape.words, longest=longest)
            self.shape = replace(first.shape, words=words)
        self.shard_sizes = np.concatenate([reader.shard_sizes for reader in readers])
        sizes = np.array([len(reader) for reader in readers])
        self.starts = np.cumsum(sizes) - sizes
        self.counts = sizes if weights is None else shares(np.array(weights), int(sizes.sum()))
        """Samples of an epoch by store."""
        if (self.counts == 0).any():
            name = names[int(np.flatnonzero(self.counts == 0)[0])]
            raise UserError(f"data.tokens: the weight of {name} is less than a sample an epoch")

    @property
    def content_hash(self) -> str:
        parts = [[reader.content_hash for reader in self.readers], self.counts.tolist()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @property
    def sample_bytes(self) -> int:
        each = np.array([reader.sample_bytes for reader in self.readers])
        return int((each * self.counts).sum() // self.counts.sum())

    @property
    def mean_length(self) -> float:
        each = np.array([reader.mean_length for reader in self.readers])
        return float((each * self.counts).sum() / self.counts.sum())

    def viewed(self, condition: str | Sequence[str], target: str, mode: ModeConfig) -> TokenReader:
        readers = [reader.viewed(condition, target, mode) for reader in self.readers]
        return MixedReader(readers, self.names, self.weights)

    @property
    def supplies(self) -> list[Supply]:
        return [supply for reader in self.readers for supply in reader.supplies]

    def fetches(self, ids: np.ndarray) -> list[tuple[Supply, ShardEntry]]:
        parts = self._parts(ids, lambda reader, own, _: reader.fetches(own))
        return [fetch for _, fetches in parts for fetch in fetches]

    def numbers(self, ids: np.ndarray) -> np.ndarray:
        """Return which store each id is of."""
        return np.searchsorted(self.starts, np.asarray(ids, np.int64), "right") - 1

    def _parts(
        self, ids: np.ndarray, read: Callable[[TokenReader, np.ndarray, np.ndarray], T]
    ) -> list[tuple[np.ndarray, T]]:
        """Read each store's part of the ids; returns it with its places among them.

        `read` is given a store's reader, its own ids, and their places.
        """
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < len(self):
            raise IndexError(f"sample ids must be in 0..{len(self) - 1}")
        numbers = self.numbers(ids)
        out = []
        for number in np.unique(numbers).tolist():
            places = np.flatnonzero(numbers == number)
            own = ids[places] - self.starts[number]
            out.append((places, read(self.readers[number], own, places)))
        return out

    def read_packed(
        self, ids: np.ndarray, pin: bool = False, draw_B: np.ndarray | None = None
    ) -> PackedBatch:
        """Read a batch; int8 tokens of several stores, whose scales differ, are restored here."""

        def read(reader: TokenReader, own: np.ndarray, places: np.ndarray) -> PackedBatch:
            return reader.read_packed(own, pin, None if draw_B is None else draw_B[places])

        parts = self._parts(ids, read)
        if len(parts) == 1:
            return parts[0][1]
        out: PackedBatch = {}
        for side in parts[0][1]:
            tokens = [(places, _plain(batch[side])) for places, batch in parts]
            out[side] = _joined(tokens, len(ids), pin)
        return out

    def text(self, ids: np.ndarray) -> Tensor | None:
        parts = self._parts(ids, lambda reader, own, _: reader.text(own))
        tensors = [(places, text) for places, text in parts if text is not None]
        return _joined(tensors, len(ids)) if len(tensors) == len(parts) else None

    def metadata(self, ids: np.ndarray) -> list[dict[str, Any]]:
        return _in_place(self._parts(ids, lambda reader, own, _: reader.metadata(own)))

    def thumbnails(self, ids: np.ndarray) -> list[bytes]:
        return _in_place(self._parts(ids, lambda reader, own, _: reader.thumbnails(own)))

    def keys(self, ids: np.ndarray) -> list[str]:
        return _in_place(self._parts(ids, lambda reader, own, _: reader.keys(own)))


def shares(weights: np.ndarray, total: int) -> np.ndarray:
    """Return whole numbers that add up to `total`, in proportion, by largest remainder."""
    exact = weights / weights.sum() * total
    counts = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _plain(tokens: Tensor | PackedTokens) -> Tensor:
    return tokens.restore() if isinstance(tokens, PackedTokens) else tokens


def _joined(parts: list[tuple[np.ndarray, Tensor]], count: int, pin: bool = False) -> Tensor:
    """Put rows of several tensors into their places, in a format that holds all of them.

    Words of shorter captions get zeros behind them.
    """
    dtype = parts[0][1].dtype
    for _, tensor in parts[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    shapes = [tensor.shape[1:] for _, tensor in parts]
    shape = (count, *max(shapes))
    out = torch.empty(shape, dtype=dtype, pin_memory=pin)
    if len(set(shapes)) > 1:
        out.zero_()
    for places, tensor in parts:
        rows = torch.from_numpy(places)
        if tensor.ndim == 1:
            out[rows] = tensor
        else:
            out[rows, : tensor.shape[1]] = tensor.to(dtype)
    return out


def _in_place(parts: list[tuple[np.ndarray, list[T]]]) -> list[T]:
    found = {place: item for places, items in parts for place, item in zip(places.tolist(), items)}
    return [found[place] for place in range(len(found))]
