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
from blip3o_lit.tokens.store.shard_cache import FETCHES

THREADS = 2 * FETCHES
"""Half of them download while the others check what came and bring it to the disk."""
LOOKS = 8
"""Coming items that are looked at for each that is read, until enough shards are ahead."""
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
    """Fetches the shards of coming items, as many as their supplies say are kept ahead.

    Who takes the items looks ahead; threads run while there is something to fetch. What fails is
    raised where the shard is read.
    """

    def __init__(self, reader: TokenReader, ids: Iterable[np.ndarray]) -> None:
        self.reader = reader
        self.shards = max(supply.ahead for supply in reader.supplies)
        self._needs = enumerate(ids)
        self._queue: deque[tuple[Supply, ShardEntry]] = deque()
        self._last: dict[tuple[str, str], int] = {}
        """The last coming item known to need a shard, by its store's address and its sha256."""
        self._reached = 0
        self._stopped = False
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._look()

    def advance(self) -> None:
        """Note that one more item is being read."""
        self._reached += 1
        self._last = {name: item for name, item in self._last.items() if item >= self._reached}
        self._look()

    def stop(self) -> None:
        """End the threads; what they are fetching is given up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            threads = [*self._threads]
        for thread in threads:
            thread.join()

    def _look(self) -> None:
        """Look at coming items until enough shards are ahead, and have fetched what is missing."""
        for _ in range(LOOKS):
            if len(self._last) >= self.shards:
                break
            item, ids = next(self._needs, (0, None))
            if ids is None:
                break
            if item < self._reached:
                continue
            for supply, entry in self.reader.fetches(ids):
                name = (supply.address, entry.sha256)
                if name not in self._last and not supply.holds(entry):
                    self._queue.append((supply, entry))
                self._last[name] = item
        if not self._queue and not self._threads:
            return
        with self._changed:
            for _ in range(min(THREADS - len(self._threads), len(self._queue))):
                thread = threading.Thread(target=self._work, name="ahead")
                self._threads.append(thread)
                thread.start()
            self._changed.notify_all()

    def _work(self) -> None:
        while (fetch := self._next()) is not None:
            supply, entry = fetch
            name = (supply.address, entry.sha256)
            while not supply.fetch_ahead(entry, self._ended):
                with self._changed:
                    self._changed.wait(1.0)  # until others are let go of
                    if self._ended() or name not in self._last:
                        break

    def _next(self) -> tuple[Supply, ShardEntry] | None:
        """Return the next shard to fetch; None, once, to a thread that is to end."""
        with self._changed:
            if self._queue and not self._ended():
                return self._queue.popleft()
            self._threads.remove(threading.current_thread())
            return None

    def _ended(self) -> bool:
        """Return whether to stop: nobody reads any more, or the program ends."""
        return self._stopped or not threading.main_thread().is_alive()
