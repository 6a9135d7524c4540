"""Shards that are fetched or made, brought before they are read, in the order of reading."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TypeVar

import numpy as np

from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import Supply
from blip3o_lit.tokens.store.index import ShardEntry

FETCHES = 4
"""Shards that a process fetches at a time."""
T = TypeVar("T")


def fetched_ahead(
    reader: TokenReader, items: Iterable[T], ids: Iterable[np.ndarray]
) -> Iterator[T]:
    """Yield the items, whose samples are `ids`, while the shards of later ones are fetched."""
    if not reader.supplies:
        yield from items
        return
    ahead = FetchAhead(reader, ids)
    try:
        for item in items:
            yield item
            ahead.advance()
    except GeneratorExit:
        ahead.stop()
        raise


class FetchAhead:
    """Threads that fetch the shards of coming items, as many as their supplies say are kept ahead.

    What fails is raised where the shard is read.
    """

    def __init__(self, reader: TokenReader, ids: Iterable[np.ndarray]) -> None:
        self.reader = reader
        self.shards = max(supply.ahead for supply in reader.supplies)
        self._needs = enumerate(ids)
        self._queue: deque[tuple[Supply, ShardEntry]] = deque()
        self._last: dict[str, int] = {}
        """The last coming item known to need a shard, by the shard's sha256."""
        self._reached = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._threads = [threading.Thread(target=self._work, name="ahead") for _ in range(FETCHES)]
        for thread in self._threads:
            thread.start()

    def advance(self) -> None:
        """Note that one more item is being read."""
        with self._changed:
            self._reached += 1
            self._last = {name: item for name, item in self._last.items() if item >= self._reached}
            self._changed.notify_all()

    def stop(self) -> None:
        """End the threads; what they are fetching is given up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (fetch := self._next()) is not None:
            supply, entry = fetch
            while not supply.fetch_ahead(entry, self._ended):
                with self._changed:
                    self._changed.wait(1.0)  # until others are let go of
                    if self._ended() or entry.sha256 not in self._last:
                        break

    def _next(self) -> tuple[Supply, ShardEntry] | None:
        """Return the next shard to fetch, waiting while enough of them are ahead."""
        with self._changed:
            while not self._queue:
                if self._ended():
                    return None
                if len(self._last) >= self.shards:
                    self._changed.wait(1.0)
                    continue
                item, ids = next(self._needs, (None, None))
                if item is None or ids is None:
                    return None
                if item < self._reached:
                    continue
                for fetch in self.reader.fetches(ids):
                    if fetch[1].sha256 not in self._last:
                        self._queue.append(fetch)
                    self._last[fetch[1].sha256] = item
            return self._queue.popleft()

    def _ended(self) -> bool:
        """Return whether to stop: nobody reads any more, or the program ends."""
        return self._stopped or not threading.main_thread().is_alive()
