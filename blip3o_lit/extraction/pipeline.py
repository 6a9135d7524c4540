"""The moving parts of an extraction: threads that read, threads that run towers, one that writes.

Each stage maps a bounded look-ahead of items in its own pool and hands the results on in order, so
decoding, the towers' forward passes and writing overlap, and the order of samples never changes.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.cuda import Event

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import EngineConfig
from blip3o_lit.config.towers import PixelsConfig
from blip3o_lit.extraction.encoding import TowerSet, to_numpy
from blip3o_lit.extraction.units import Ledger, UnitFiles, UnitRecord
from blip3o_lit.images.item import Item, Lost, Part, Reject, decode
from blip3o_lit.images.split import Splitter
from blip3o_lit.tokens.store.index import ArraySpec

T = TypeVar("T")
R = TypeVar("R")
LOOK_AHEAD = 3
"""Batches that are decoded ahead of the towers, and batches that may wait for the disk."""
MOST_LANES = 8
"""Batches that a CPU's cores encode side by side; each holds a batch's activations in memory."""


@dataclass(frozen=True)
class Ready:
    """A decoded, split and resized image."""

    item: Item
    split: str
    inputs: dict[str, Tensor]


@dataclass(frozen=True)
class Batch:
    """Images of one unit that go through the towers together."""

    files: UnitFiles
    ready: list[Ready]
    images: int
    """Entries of the source, lost ones included."""
    closes: bool
    """Whether the unit ends with it."""


class Pipeline:
    """Runs missing units of work.

    On a CPU each batch has one core (of up to 8; more cores are shared out) and several run side
    by side: faster than one batch on all cores, and the tokens' last bits depend on neither the
    number of cores nor on what else the machine does.
    """

    def __init__(
        self,
        towers: TowerSet,
        ledger: Ledger,
        splitter: Splitter,
        engine: EngineConfig,
        arrays: dict[str, ArraySpec],
        scales: dict[str, np.ndarray],
        pixels: PixelsConfig,
    ) -> None:
        """Take the parts; `scales` are the channel scales of int8 arrays."""
        self.towers, self.ledger, self.splitter, self.engine = towers, ledger, splitter, engine
        self.arrays, self.scales, self.pixels = arrays, scales, pixels
        self.lanes, self.lane_threads = cpu_lanes(towers.device)

    def run(
        self, parts: list[tuple[int, Part]], done: dict[int, list[UnitRecord]]
    ) -> Iterator[tuple[int, UnitRecord | None]]:
        """Do the missing units of some parts.

        Args:
            parts: Parts with their numbers.
            done: The finished units of each part.

        Yields:
            After each batch: its images and, when it closed a unit, that unit's record.
        """
        readers = ThreadPoolExecutor(self.engine.threads, "decode")
        forward = ThreadPoolExecutor(self.lanes, "towers", self._start_lane)
        disk = ThreadPoolExecutor(1, "write")
        ahead = (self.lanes + LOOK_AHEAD) * self.engine.batch_size
        loaded = ordered(readers, self._load, self._entries(parts, done), ahead)
        encoded = ordered(forward, self._encode, self._batches(loaded), self.lanes + 1)
        try:
            yield from ordered(disk, self._write, encoded, LOOK_AHEAD)
        finally:
            for pool in (readers, forward, disk):
                pool.shutdown(cancel_futures=True)

    def _start_lane(self) -> None:
        if self.towers.device.type == "cpu":
            torch.set_num_threads(self.lane_threads)

    def _entries(
        self, parts: list[tuple[int, Part]], done: dict[int, list[UnitRecord]]
    ) -> Iterator[tuple[UnitFiles, Item | Lost | None]]:
        """Yield the entries of every missing unit in order, None at a unit's end."""
        size = self.engine.shard_samples
        for number, part in parts:
            unit = len(done[number])
            if unit and done[number][-1].last:
                continue
            entries = part.entries(unit * size)
            upcoming = next(entries, None)
            while True:
                self._check_disk(size)
                files = UnitFiles(self.ledger, number, unit, self.arrays, self.scales)
                while upcoming is not None and files.seen < size:
                    files.seen += 1
                    yield files, upcoming
                    upcoming = next(entries, None)
                files.last = upcoming is None
                yield files, None
                unit += 1
                if upcoming is None:
                    break

    def _check_disk(self, images: int) -> None:
        needed = min(images, self.engine.shard_samples) * self.towers.sample_bytes
        free = shutil.disk_usage(self.ledger.out).free
        if needed > free:
            raise UserError(
                f"out={self.ledger.out} has {free / 1e9:.2f} GB free, the next shard takes up to "
                f"{needed / 1e9:.2f} GB: free some and run the same line again"
            )

    def _load(
        self, step: tuple[UnitFiles, Item | Lost | None]
    ) -> tuple[UnitFiles, Ready | Lost | None]:
        files, entry = step
        return files, self.load(entry) if isinstance(entry, Item) else entry

    def load(self, item: Item) -> Ready | Lost:
        """Read, decode, split and resize one image."""
        try:
            image = decode(item.read(), self.pixels)
        except Reject as error:
            return Lost(item.source, str(error))
        return Ready(item, item.split or self.splitter(image), self.towers.prepare(image))

    def _batches(self, entries: Iterator[tuple[UnitFiles, Ready | Lost | None]]) -> Iterator[Batch]:
        """Gather full batches; a unit's last one may be smaller, and closes the unit."""
        ready: list[Ready] = []
        count = 0
        for files, entry in entries:
            if isinstance(entry, Lost):
                files.lost.append(asdict(entry))
            elif entry is not None:
                ready.append(entry)
            count += entry is not None
            if entry is None or len(ready) == self.engine.batch_size:
                yield Batch(files, ready, count, closes=entry is None)
                ready, count = [], 0

    def _encode(self, batch: Batch) -> tuple[Batch, dict[str, Tensor], Event | None]:
        if not batch.ready:
            return batch, {}, None
        captions = [ready.item.caption for ready in batch.ready]
        outputs = self.towers.encode([ready.inputs for ready in batch.ready], captions)
        return batch, outputs, self.towers.mark()

    def _write(
        self, step: tuple[Batch, dict[str, Tensor], Event | None]
    ) -> tuple[int, UnitRecord | None]:
        batch, outputs, copied = step
        if copied is not None:
            copied.synchronize()
        arrays = {name: to_numpy(tensor) for name, tensor in outputs.items()}
        for row, ready in enumerate(batch.ready):
            item = ready.item
            sample = {name: array[row] for name, array in arrays.items()}
            facts = {"caption": item.caption, "source": item.source, **item.extra}
            batch.files.shard(ready.split).add(item.sample_key, sample, facts)
        return batch.images, batch.files.close() if batch.closes else None


def cpu_lanes(device: torch.device) -> tuple[int, int]:
    """Return how many batches a device encodes side by side, and the threads of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    lanes = min(cores or 1, MOST_LANES) if device.type == "cpu" else 1
    return lanes, (cores or 1) // lanes


def ordered(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[R]:
    """Map in a pool and yield the results in order, at most `window` items ahead."""
    queue: deque[Future[R]] = deque()
    for item in items:
        queue.append(pool.submit(function, item))
        if len(queue) > window:
            yield queue.popleft().result()
    while queue:
        yield queue.popleft().result()
