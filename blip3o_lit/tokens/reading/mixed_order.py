"""An order over several stores, with a share for each.

A store whose share is larger than itself goes on into further epochs of its own, so none of its
samples comes twice before all have come. Stores are interleaved evenly: every stretch of the order
has each store's share, to within a sample or two.
"""

import numpy as np

from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.reader import TokenReader


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
