"""Several stores read as one: their samples side by side, and an order with a share for each.

An epoch has as many samples as the stores together. Without weights each comes once; with weights a
store has its share of them, by largest remainder. A store whose share is larger than itself goes on
into further epochs of its own, so none of its samples comes twice before all have come. Stores are
interleaved evenly: every stretch of the order has each store's share, to within a sample or two.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.open import open_store
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.packed import PackedBatch, PackedTokens
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import Supply, TokenStore
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex

T = TypeVar("T")
COMPARED = ("kind", "tower", "layer", "shape", "cls", "grid", "normed", "projected")
COMPARED += ("preprocessing",)
"""Facts of an array that the stores of a run have in common."""


class StoreSet:
    """Stores of equal arrays, in an order that does not depend on how they are named.

    Stores of equal content are one: their weights add up.
    """

    def __init__(
        self,
        stores: Mapping[str, float | None],
        data: DataConfig,
        opened: Callable[[str, DataConfig], TokenStore] = open_store,
    ) -> None:
        """Open the stores by path or address; weights are given for all of them or for none."""
        found: dict[str, TokenStore] = {}
        weights: dict[str, float] = {}
        for path, weight in stores.items():
            store = opened(path, data)
            key = store.index.hash
            found.setdefault(key, store)
            weights[key] = weights.get(key, 0.0) + (weight or 0.0)
        self.weighted = len(found) > 1 and all(weight is not None for weight in stores.values())
        self.stores = [found[key] for key in sorted(found)]
        self.weights = [weights[key] for key in sorted(found)]
        self.names = _names([store.address for store in self.stores])

    def check(self, arrays: Sequence[str]) -> None:
        """Refuse stores whose arrays of these names differ, naming the difference."""
        first, *others = self.stores
        for other in others:
            pair = (
                f"in {first.address} and {{}} in {other.address}: a run's stores have equal arrays"
            )
            for name in arrays:
                one, two = (store.index.arrays.get(name) for store in (first, other))
                if one is None or two is None:
                    lacking = first if one is None else other
                    raise UserError(f"data.tokens: {lacking.address} has no array {name}")
                for key in COMPARED:
                    old, new = getattr(one, key), getattr(two, key)
                    if key == "shape" and one.kind == two.kind == "sequence":
                        old, new = old[1:], new[1:]  # the longest captions may differ
                    if old != new:
                        raise UserError(f"data.tokens: {key} of {name} is {old} {pair.format(new)}")
            if first.index.reduced != other.index.reduced:
                kinds = [store.index.reduced or "full" for store in (first, other)]
                raise UserError(f"data.tokens: tokens are {kinds[0]} {pair.format(kinds[1])}")

    def with_split(self, split: str) -> list[int]:
        """Return the numbers of the stores that have a split."""
        return [n for n, store in enumerate(self.stores) if split in store.index.splits]

    def facts(self) -> list[dict[str, Any]]:
        """Return what a run's record says of each store."""
        weights = self.weights if self.weighted else [None] * len(self.stores)
        return [
            {"path": store.address, "hash": store.index.hash, "weight": weight}
            for store, weight in zip(self.stores, weights)
        ]

    def reader(
        self,
        split: str,
        condition: str | Sequence[str],
        target: str,
        mode: ModeConfig,
        max_shards: int | None = None,
        limit: int | None = None,
        weighted: bool = False,
    ) -> TokenReader:
        """Return the reader of a split of all stores that have it; one store has a plain one.

        `max_shards` counts in each store; of `limit` samples each gives an equal part.
        """
        numbers = self.with_split(split) or [0]
        if limit is not None:
            limit = max(1, limit // len(numbers))
        readers = [
            TokenReader(self.stores[n], split, condition, target, mode, max_shards, limit)
            for n in numbers
        ]
        if len(readers) == 1:
            return readers[0]
        weights = [self.weights[n] for n in numbers] if weighted and self.weighted else None
        return MixedReader(readers, [self.names[n] for n in numbers], weights)


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


class MixedOrder:
    """Sample ids by global position over several stores, each with an order of its own."""

    def __init__(self, seed: int, reader: MixedReader, window: int) -> None:
        self.seed, self.reader, self.window = seed % 2**63, reader, window
        self.counts, self.starts = reader.counts, reader.starts
        self.samples = int(self.counts.sum())
        self.orders = [
            SampleOrder(seed + number, one.shard_sizes, window)
            for number, one in enumerate(reader.readers)
        ]

    def again(self) -> "MixedOrder":
        """Return the same order, which keeps windows of its own."""
        return MixedOrder(self.seed, self.reader, self.window)

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids, and each one's epoch in its own store, at `count` positions."""
        ids, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(position + done, self.samples)
            length = min(count - done, self.samples - place)
            numbers, before = interleaved(self.counts, place, length)
            for number, order in enumerate(self.orders):
                places = np.flatnonzero(numbers == number)
                if len(places):
                    own = epoch * int(self.counts[number]) + int(before[places[0]])
                    found, own_epochs = order.at(own, len(places))
                    ids[done + places] = found + self.starts[number]
                    epochs[done + places] = own_epochs
            done += length
        return ids, epochs


def order_of(reader: TokenReader, seed: int, window: int) -> SampleOrder | MixedOrder:
    """Return the order of a run's training samples."""
    if isinstance(reader, MixedReader):
        return MixedOrder(seed, reader, window)
    return SampleOrder(seed, reader.shard_sizes, window)


def interleaved(counts: np.ndarray, first: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the store at `length` places from `first` on, and how many of it came before.

    The first store's samples are spread evenly over the epoch, the second's over what is left, and
    so on; over all `counts.sum()` places each store comes `counts` times.
    """
    places = np.arange(first, first + length)
    numbers, before = np.zeros(length, np.int64), np.zeros(length, np.int64)
    left = np.ones(length, bool)
    rest = int(counts.sum())
    for number, count in enumerate(counts.tolist()):
        earlier = places * count // rest
        own = left & ((places + 1) * count // rest > earlier)
        numbers[own], before[own] = number, earlier[own]
        places, rest, left = places - earlier, max(rest - count, 1), left & ~own
    return numbers, before


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


def _names(addresses: list[str]) -> list[str]:
    """Return the folders' names, with numbers where two are called alike."""
    names = [Path(address).resolve().name.replace("/", "_") for address in addresses]
    return [
        name if names.count(name) == 1 else f"{name}-{names[:number].count(name) + 1}"
        for number, name in enumerate(names)
    ]
