"""Images -> token shards: decoding in threads, both towers in one pass, one shard a unit of work.

Kill it anywhere and run it again: finished units stay, the unit in progress is done anew, and the
store is byte-identical to that of an undisturbed run (same machine, same number of threads of the
tower's arithmetic). Workers share nothing but the folder.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.cuda import Event

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction_towers import TowerSet, to_numpy
from blip3o_lit.extraction_units import Ledger, UnitFiles, UnitRecord, check_rejects, my_parts
from blip3o_lit.images.item import Item, Lost, Part, Reject, Source, decode
from blip3o_lit.images.split import Splitter
from blip3o_lit.progress import Work
from blip3o_lit.tokens.index import TokenIndex
from blip3o_lit.towers.tower import Tower

T = TypeVar("T")
R = TypeVar("R")
LOOK_AHEAD = 3
"""Batches that are decoded ahead of the towers, and batches that may wait for the disk."""
REJECTS_AFTER = 1000
"""Images before which a high share of bad ones does not stop the run early."""


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


@dataclass(frozen=True)
class Outcome:
    """What one run of the engine did."""

    index: TokenIndex | None
    """None while units of other workers are missing."""
    images: int
    """Images that this run read; earlier runs' units are not counted."""
    seconds: float
    already: bool
    """Whether the store was complete before."""


class Extraction:
    """One extraction into one folder."""

    def __init__(
        self, source: Source, towers: Mapping[str, Tower], out: Path, config: ExtractConfig
    ) -> None:
        """Check that the work can begin.

        Args:
            source: The images.
            towers: By array name, condition first.
            out: Folder of the store.
            config: Storage, split, batches; `images` and `out` of it are not read.

        Raises:
            UserError: If the folder holds another store, or the disk is too small.
        """
        engine = config.extract
        self.source, self.out, self.config, self.engine = source, out, config, engine
        self.worker, self.workers = worker_of(engine.shard)
        self.splitter = Splitter(config.split.by, config.split.fraction, config.split.seed)
        self.set = TowerSet(
            towers,
            source.captions,
            config.storage,
            config.store,
            device_of(engine.device),
            engine.compile,
        )
        on_cpu = self.set.device.type == "cpu"
        self.lanes = (os.cpu_count() or 1) if on_cpu else 1
        self.split_rule = source.split_rule or self.splitter.words
        self.ledger = Ledger(out, source, self._recipe(), engine.shard_samples)

    def _recipe(self) -> dict[str, Any]:
        return {
            "images": self.source.name,
            "source": self.source.fingerprint,
            "arrays": {name: spec.to_dict() for name, spec in self.set.arrays.items()},
            "pretrained": self.config.towers.pretrained,
            "split": asdict(self.config.split),
            "split_rule": self.split_rule,
            "shard_samples": self.engine.shard_samples,
            "batch_size": self.engine.batch_size,
        }

    def run(self) -> Outcome:
        """Do this worker's missing units, then finish the store if all are there.

        Raises:
            UserError: If too many images can't be read, or memory or disk run out.
        """
        began = time.perf_counter()
        if self.ledger.finished:
            return Outcome(TokenIndex.load(self.out), 0, 0.0, already=True)
        parts = list(my_parts(self.source.parts, self.worker, self.workers))
        done = {number: self.ledger.done(number) for number, _ in parts}
        before = sum(record.seen for records in done.values() for record in records)
        total = self._total(parts, before)
        self._check_disk(total - before)
        with Work("extracting", total, "images") as work:
            work.skip(before)
            self._do(parts, done, work)
        index = self.ledger.finish(
            self.set.arrays,
            self.set.heads(),
            self.split_rule,
            None if self.config.store == "full" else self.config.store,
            self.config.max_reject_fraction,
        )
        return Outcome(index, work.done - before, time.perf_counter() - began, already=False)

    def _total(self, parts: list[tuple[int, Part]], before: int) -> int:
        lengths = [part.length for _, part in parts]
        return max(sum(length or 0 for length in lengths), before)

    def _check_disk(self, images: int) -> None:
        needed = images * self.set.sample_bytes
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise UserError(
                f"out={self.out} has {free / 1e9:.1f} GB free, the tokens of {images} images take "
                f"{needed / 1e9:.1f} GB: free some, choose another folder or store=grid_64"
            )

    def _do(
        self, parts: list[tuple[int, Part]], done: dict[int, list[UnitRecord]], work: Work
    ) -> None:
        """Run all missing units: threads decode, threads run the towers, one thread writes."""
        rejects = sum(record.rejects for records in done.values() for record in records)
        seen = sum(record.seen for records in done.values() for record in records)
        readers = ThreadPoolExecutor(self.engine.threads, "decode")
        towers = ThreadPoolExecutor(self.lanes, "towers", self._start_lane)
        disk = ThreadPoolExecutor(1, "write")
        ahead = (self.lanes + LOOK_AHEAD) * self.engine.batch_size
        loaded = ordered(readers, self._load, self._entries(parts, done), ahead)
        encoded = ordered(towers, self._encode, self._batches(loaded), self.lanes + 1)
        try:
            for images, record in ordered(disk, self._write, encoded, LOOK_AHEAD):
                work.advance(images)
                if record is None:
                    continue
                rejects, seen = rejects + record.rejects, seen + record.seen
                if seen >= REJECTS_AFTER:
                    check_rejects(rejects, seen, self.config.max_reject_fraction, record.lost)
        finally:
            for pool in (readers, towers, disk):
                pool.shutdown(cancel_futures=True)

    def _start_lane(self) -> None:
        """Give a towers' thread one core: its sums then don't depend on the machine's cores."""
        if self.set.device.type == "cpu":
            torch.set_num_threads(1)

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
                files = UnitFiles(self.ledger, number, unit, self.set.arrays)
                while upcoming is not None and files.seen < size:
                    files.seen += 1
                    yield files, upcoming
                    upcoming = next(entries, None)
                files.last = upcoming is None
                yield files, None
                unit += 1
                if upcoming is None:
                    break

    def _load(
        self, step: tuple[UnitFiles, Item | Lost | None]
    ) -> tuple[UnitFiles, Ready | Lost | None]:
        """Read, decode, split and resize one image."""
        files, entry = step
        if not isinstance(entry, Item):
            return files, entry
        try:
            image = decode(entry.read())
        except Reject as error:
            return files, Lost(entry.source, str(error))
        split = entry.split or self.splitter(image)
        return files, Ready(entry, split, self.set.prepare(image))

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
        """Run the towers over a batch."""
        if not batch.ready:
            return batch, {}, None
        captions = [ready.item.caption for ready in batch.ready]
        outputs = self.set.encode([ready.inputs for ready in batch.ready], captions)
        return batch, outputs, self.set.mark()

    def _write(
        self, step: tuple[Batch, dict[str, Tensor], Event | None]
    ) -> tuple[int, UnitRecord | None]:
        """Write a batch's tokens; returns its images and, where it closes a unit, the record."""
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


def worker_of(shard: str | None) -> tuple[int, int]:
    """Return this process's number and the number of workers.

    Args:
        shard: `extract.shard=i/n`; None takes torchrun's, then a Slurm array's variables.

    Raises:
        UserError: If it is no i/n with 0 <= i < n.
    """
    environment = os.environ
    if shard is None and "RANK" in environment and "WORLD_SIZE" in environment:
        shard = f"{environment['RANK']}/{environment['WORLD_SIZE']}"
    elif shard is None and "SLURM_ARRAY_TASK_ID" in environment:
        first = int(environment.get("SLURM_ARRAY_TASK_MIN", "0"))
        step = int(environment.get("SLURM_ARRAY_TASK_STEP", "1"))
        number = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step
        shard = f"{number}/{environment.get('SLURM_ARRAY_TASK_COUNT', '1')}"
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"extract.shard={shard} must be i/n with i from 0 to n - 1")
    return int(found[1]), int(found[2])


def device_of(device: str) -> str:
    """Return the torch device: `auto` takes this process's GPU, or the CPU where there is none.

    Raises:
        UserError: If a GPU is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"extract.device={device}: no GPU is visible; extract.device=cpu runs")
    return device


def extract(
    source: Source, towers: Mapping[str, Tower], out: Path, config: ExtractConfig
) -> Outcome:
    """Turn the images of a source into a token store; see `Extraction`."""
    return Extraction(source, towers, out, config).run()
