"""The moving parts of an extraction: threads that read, threads that run towers, one that writes.

Each stage maps a bounded look-ahead of items in its own pool and hands the results on in order, so
decoding, the towers' forward passes and writing overlap, and the order of samples never changes.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.cuda import Event

from blip3o_lit.base.files import check_disk
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction.append import CONTENT, Held, content_of
from blip3o_lit.extraction.encoding import WORDS, TowerSet, samples_of, to_numpy
from blip3o_lit.extraction.units import Ledger, Unit, UnitRecord
from blip3o_lit.images.item import Item, Lost, Part, Reject, decode
from blip3o_lit.images.split import Splitter
from blip3o_lit.tokens.reading.loader import ordered
from blip3o_lit.tokens.store.index import ArraySpec

LOOK_AHEAD = 3
"""Batches that are decoded ahead of the towers, and batches that may wait for the disk."""
MOST_LANES = 8
"""Batches that a CPU's cores encode side by side; each holds a batch's activations in memory."""


@dataclass(frozen=True)
class Ready:
    item: Item
    split: str
    inputs: dict[str, Tensor]
    thumbnail: bytes | None
    content: str
    """Hash of its file; empty for a drawn one."""


class Known:
    """A picture that the store holds already."""


@dataclass(frozen=True)
class Batch:
    """Images of one unit that go through the towers together."""

    unit: Unit
    ready: list[Ready]
    entries: int
    """Entries of the source, lost ones included."""
    closes: bool
    """Whether the unit ends with it."""


class Pipeline:
    """Runs missing units of work; `scales` are the channel scales of int8 arrays.

    Pictures that are `held` are passed over.
    """

    def __init__(
        self,
        towers: TowerSet,
        ledger: Ledger,
        splitter: Splitter,
        config: ExtractConfig,
        arrays: dict[str, ArraySpec],
        scales: dict[str, np.ndarray],
        held: Held | None = None,
    ) -> None:
        self.towers, self.ledger, self.splitter, self.held = towers, ledger, splitter, held
        self.engine, self.pixels = config.extract, config.pixels
        self.arrays, self.scales = arrays, scales
        self._open: set[Unit] = set()

    def run(
        self, parts: list[tuple[int, Part]], done: dict[int, list[UnitRecord]]
    ) -> Generator[tuple[int, UnitRecord | None]]:
        """Do the units of numbered parts that are not `done`.

        Yields a batch's entries and, when it closed a unit, that unit's record.
        """
        lanes, forward = tower_pool(self.towers.device)
        readers = ThreadPoolExecutor(self.engine.threads, "decode")
        disk = ThreadPoolExecutor(1, "write")
        ahead = (lanes + LOOK_AHEAD) * self.engine.batch_size
        loaded = ordered(readers, self._load, self._entries(parts, done), ahead)
        encoded = ordered(forward, self._encode, self._batches(loaded), lanes + 1)
        try:
            yield from ordered(disk, self._write, encoded, LOOK_AHEAD)
        finally:
            for pool in (readers, forward, disk):
                pool.shutdown(cancel_futures=True)
            for unit in self._open:
                unit.abort()
            self._open.clear()

    def _entries(
        self, parts: list[tuple[int, Part]], done: dict[int, list[UnitRecord]]
    ) -> Iterator[tuple[Unit, Item | Lost | None]]:
        """Yield the entries of every missing unit in order, None at a unit's end."""
        size = self.engine.shard_samples
        fix = "free some and run the same line again"
        for number, part in parts:
            records = done[number]
            if records and records[-1].last:
                continue
            entries = part.entries(len(records) * size)
            upcoming = next(entries, None)
            unit = self._unit(number, len(records))
            while not unit.last:
                left = size if part.length is None else min(size, part.length - unit.number * size)
                needed = left * self.towers.sample_bytes
                what = "the next shard takes up to"
                check_disk(self.ledger.out, needed, what, fix, self.ledger.key)
                while upcoming is not None and unit.seen < size:
                    unit.seen += 1
                    yield unit, upcoming
                    upcoming = next(entries, None)
                unit.last = upcoming is None
                yield unit, None
                if upcoming is not None:
                    unit = self._unit(number, unit.number + 1)

    def _unit(self, part_number: int, number: int) -> Unit:
        thumbnails = self.towers.thumbnails
        unit = Unit(self.ledger, part_number, number, self.arrays, self.scales, thumbnails)
        self._open.add(unit)
        return unit

    def _load(
        self, step: tuple[Unit, Item | Lost | None]
    ) -> tuple[Unit, Ready | Lost | Known | None]:
        unit, entry = step
        if not isinstance(entry, Item):
            return unit, entry
        try:
            raw = entry.read()
            content = content_of(raw)
            if self.held is not None:
                if content in self.held:
                    return unit, Known()
                entry = self.held.named(entry, content)
            image = decode(raw, self.pixels)
        except Reject as error:
            return unit, Lost(entry.source, str(error))
        split = entry.split or self.splitter(image)
        inputs = self.towers.prepare(image)
        return unit, Ready(entry, split, inputs, self.towers.thumbnail(inputs), content)

    def _batches(
        self, entries: Iterator[tuple[Unit, Ready | Lost | Known | None]]
    ) -> Iterator[Batch]:
        """Gather full batches; a unit's last one may be smaller, and closes the unit."""
        ready: list[Ready] = []
        count = 0
        for unit, entry in entries:
            if isinstance(entry, Lost):
                unit.lost.append(asdict(entry))
            elif isinstance(entry, Known):
                unit.known += 1
            elif entry is not None:
                ready.append(entry)
            count += entry is not None
            if entry is None or len(ready) == self.engine.batch_size:
                yield Batch(unit, ready, count, closes=entry is None)
                ready, count = [], 0

    def _encode(self, batch: Batch) -> tuple[Batch, dict[str, Tensor], Event | None]:
        if not batch.ready:
            return batch, {}, None
        captions = [ready.item.captions for ready in batch.ready]
        outputs = self.towers.encode([ready.inputs for ready in batch.ready], captions)
        return batch, outputs, self.towers.mark()

    def _write(
        self, step: tuple[Batch, dict[str, Tensor], Event | None]
    ) -> tuple[int, UnitRecord | None]:
        batch, outputs, copied = step
        if copied is not None:
            copied.synchronize()
        arrays = {name: to_numpy(tensor) for name, tensor in outputs.items()}
        for sample, ready in zip(samples_of(arrays) if arrays else (), batch.ready, strict=True):
            item = ready.item
            facts = {"caption": item.caption, "source": item.source, **item.extra}
            if WORDS in sample and item.further:
                facts["captions"] = list(item.captions)
            if ready.content:
                facts[CONTENT] = ready.content
            shard = batch.unit.shard(ready.split)
            shard.add(item.sample_key, sample, facts, ready.thumbnail)
        if not batch.closes:
            return batch.entries, None
        record = batch.unit.close()
        self._open.discard(batch.unit)
        return batch.entries, record


def tower_pool(device: torch.device) -> tuple[int, ThreadPoolExecutor]:
    """Return how many batches a device encodes side by side, and the threads that do.

    On a CPU each batch has one core (of up to 8; more cores are shared out): faster than one batch
    on all cores, and the tokens' last bits depend on neither the number of cores nor on what else
    the machine does.
    """
    if device.type != "cpu":
        return 1, ThreadPoolExecutor(1, "towers", _on_a_stream, (device,))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    lanes = min(cores, MOST_LANES)
    return lanes, ThreadPoolExecutor(lanes, "towers", torch.set_num_threads, (cores // lanes,))


def _on_a_stream(device: torch.device) -> None:
    """Give a thread a stream of its own, so that no training step beside it waits for towers."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))  # on which the weights came
    torch.cuda.set_stream(stream)
