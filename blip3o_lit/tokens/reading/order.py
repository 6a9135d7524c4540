"""The order of training samples: a pure function of (seed, epoch, shard sizes, position).

Positions count samples since the run's start, over all ranks and epochs: position p lies in epoch
p // n at place p % n. Epochs follow one another without a gap, so a batch may straddle the end of
one, no sample is ever dropped, and a batch may be larger than the data set. Shards are shuffled,
then samples within windows of a few shards, so that reads stay local. Only the windows that are
asked for are computed, so starting or resuming costs nothing on a large store.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

WINDOWS_KEPT = 8


def evenly(total: int, count: int) -> np.ndarray:
    """Return `count` of `total` sample ids, evenly spaced from the first to the last, or all."""
    return np.linspace(0, total - 1, min(count, total)).round().astype(np.int64)


def random_permutation(seed: int, epoch: int, stream: int, count: int) -> np.ndarray:
    """Return a permutation of 0..count-1 that depends on the arguments alone.

    Raw words of Philox, whose output numpy keeps stable across versions, are sorted with the index
    in their low bits: faster than an argsort, and ties have one outcome.
    """
    words = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, stream]).random_raw(count)
    mask = np.uint64((1 << max(count - 1, 1).bit_length()) - 1)
    words = np.sort((words & ~mask) | np.arange(count, dtype=np.uint64))
    return (words & mask).astype(np.int64)


class SampleOrder:
    """Sample ids by global position; samples are shuffled within `window` shards at a time."""

    def __init__(self, seed: int, shard_sizes: np.ndarray, window: int) -> None:
        self.seed = seed % 2**63
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.samples, self.window = int(self.sizes.sum()), window
        self._epoch = lru_cache(maxsize=2)(self._compute_epoch)
        self._window = lru_cache(maxsize=WINDOWS_KEPT)(self._compute_window)

    def again(self) -> SampleOrder:
        """Return the same order, which keeps windows of its own."""
        return SampleOrder(self.seed, self.sizes, self.window)

    def _compute_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's shard order and the place where each window starts (and the end)."""
        shards = random_permutation(self.seed, epoch, 0, len(self.sizes))
        ends = np.cumsum(self.sizes[shards])
        bounds = np.append(0, ends)[:: self.window]
        return shards, bounds if bounds[-1] == self.samples else np.append(bounds, self.samples)

    def _compute_window(self, epoch: int, number: int) -> np.ndarray:
        shards = self._epoch(epoch)[0][number * self.window : (number + 1) * self.window]
        sizes = self.sizes[shards]
        total = int(sizes.sum())
        base = np.repeat(self.starts[shards] - (np.cumsum(sizes) - sizes), sizes)
        return (base + np.arange(total))[random_permutation(self.seed, epoch, number + 1, total)]

    def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids and epochs at `count` positions from `position` on, both int64."""
        ids, epochs = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(position + done, self.samples)
            bounds = self._epoch(epoch)[1]
            number = int(np.searchsorted(bounds, place, "right")) - 1
            inside = place - int(bounds[number])
            piece = self._window(epoch, number)[inside : inside + count - done]
            ids[done : done + len(piece)] = piece
            epochs[done : done + len(piece)] = epoch
            done += len(piece)
        return ids, epochs
