"""The stores of a run: opened, checked to be equal in what a run reads, and named."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.open import open_store
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

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


def _names(addresses: list[str]) -> list[str]:
    """Return the folders' names, with numbers where two are called alike."""
    names = [Path(address).resolve().name.replace("/", "_") for address in addresses]
    return [
        name if names.count(name) == 1 else f"{name}-{names[:number].count(name) + 1}"
        for number, name in enumerate(names)
    ]
