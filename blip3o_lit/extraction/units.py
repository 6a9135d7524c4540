"""The bookkeeping of an extraction: units of work, and the records that they leave.

While an extraction runs, its folder has a hidden `.extract/`: `plan.json` says what is being made,
and each finished unit of work leaves a record there, written last, after its shards are on disk.
What has a record is never done again. Nothing in any file depends on time, process or worker.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit.base.files import write_synced
from blip3o_lit.config.errors import UserError
from blip3o_lit.extraction.append import OldStore
from blip3o_lit.images.item import Source
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex, check_split
from blip3o_lit.tokens.store.shards import ShardWriter

STATE = ".extract"
ATTEMPTS, PAUSE = 5, 0.5
"""Attempts to finish beside another worker that does the same, and seconds between them."""
UNITS_PER_TAR = 10_000
"""Unit numbers set aside for one input tar, whose length is not known beforehand."""


@dataclass
class UnitRecord:
    """What one finished unit of work left."""

    seen: int
    """Entries that it read."""
    last: bool
    """Whether its part of the source ended with it."""
    shards: list[ShardEntry] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    """Source and reason of what could not be used, and whether an image was lost with it."""
    known: int = 0
    """Images that an append found in the store."""

    @property
    def rejects(self) -> int:
        """Images that were lost."""
        return sum(entry["image"] for entry in self.lost)

    @property
    def images(self) -> int:
        """Images that were stored or lost."""
        return self.seen - len(self.lost) + self.rejects - self.known

    def add(self, other: UnitRecord) -> None:
        self.seen += other.seen
        self.shards += other.shards
        self.lost += other.lost
        self.known += other.known


class Ledger:
    """The records of one output folder; `recipe` is all that decides the store's content.

    `old` is the store that the folder holds and that the source is appended to; `key` is the
    override that names the folder.
    """

    def __init__(
        self,
        out: Path,
        source: Source,
        recipe: dict[str, Any],
        shard_samples: int,
        old: OldStore | None = None,
        key: str = "out",
    ) -> None:
        """Open the folder for this recipe, or find that it is finished."""
        self.key = key
        self.out, self.source, self.recipe, self.old = out, source, recipe, old
        self.shard_samples = shard_samples
        self.state = out / STATE
        self.first = 0 if old is None else old.first_unit
        self.finished = (out / "index.json").exists() and old is None
        if old is not None:
            self._open_append(old)
            return
        if self.finished:
            self._same(out / "extraction.json", "a finished token store")
            self.clear()
            return
        self.state.mkdir(parents=True, exist_ok=True)
        plan = self.state / "plan.json"
        if plan.exists() and any(self.state.glob("unit-*.json")):
            self._same(plan, "an unfinished extraction")
        self.write_recipe(plan)

    def _open_append(self, old: OldStore) -> None:
        """Go on with an append that was stopped, or begin it; what is known is looked up later."""
        plan = self.state / "plan.json"
        records = [json.loads(path.read_bytes()) for path in self.state.glob("unit-*.json")]
        listed = {shard.file for shard in old.index.shards}
        made = {shard["file"] for record in records for shard in record["shards"]}
        if made and made <= listed:  # it was stopped after its last step but for clearing up
            self.clear()
        self.finished = old.has_all_of(self.source.name, self.source.fingerprint)
        if self.finished:
            self.clear()
            return
        self.state.mkdir(parents=True, exist_ok=True)
        if plan.exists() and records and not made <= listed:
            fix = f"repeat the line that began it, or remove {self.state} to begin anew"
            self._same(plan, "an unfinished append", fix)
        self.write_recipe(plan)

    def write_recipe(self, path: Path) -> None:
        write_synced(path, json.dumps(self.recipe, sort_keys=True, indent=1).encode())

    def clear(self) -> None:
        shutil.rmtree(self.state, ignore_errors=True)

    def _same(
        self,
        path: Path,
        what: str,
        fix: str = "choose another folder, or repeat the line that began it",
    ) -> None:
        try:
            old = json.loads(path.read_bytes())
        except FileNotFoundError:
            old = {}
        recipe = json.loads(json.dumps(self.recipe))
        differing = [key for key in recipe if old.get(key) != recipe[key]]
        if differing:
            raise UserError(
                f"{self.key}={self.out} holds {what} made with another {', '.join(differing)}: "
                f"{fix}"
            )

    def unit_name(self, part_number: int, unit: int) -> str:
        """Return the six digits that name a unit and its shards."""
        parts = self.source.parts
        if any(part.length is None for part in parts):
            if unit >= UNITS_PER_TAR:
                raise UserError(
                    f"{parts[part_number].name} has over {unit * self.shard_samples} "
                    "images: raise extract.shard_samples"
                )
            return f"{self.first + part_number * UNITS_PER_TAR + unit:06d}"
        splits = [part.split for part in parts]
        if all(splits):  # numbered within their split
            part_number = splits[:part_number].count(splits[part_number])
        return f"{self.first + part_number:06d}"

    def record_path(self, part_number: int, unit: int) -> Path:
        split = self.source.parts[part_number].split or "all"
        return self.state / f"unit-{split}-{self.unit_name(part_number, unit)}.json"

    def _record(self, part_number: int, unit: int) -> UnitRecord | None:
        """Return a unit's record if it is finished and its shards are there."""
        try:
            data = json.loads(self.record_path(part_number, unit).read_bytes())
        except FileNotFoundError:
            return None
        shards = [ShardEntry(**shard) for shard in data["shards"]]
        for shard in shards:
            file = self.out / shard.file
            if not file.is_file() or file.stat().st_size != shard.bytes:
                return None
        return UnitRecord(**{**data, "shards": shards})

    def done(self, part_number: int) -> list[UnitRecord]:
        """Return the finished units of a part, in order, up to the first that is missing."""
        records: list[UnitRecord] = []
        while not (records and records[-1].last):
            record = self._record(part_number, len(records))
            if record is None:
                break
            records.append(record)
        return records

    def finish(self, write_store: Callable[[UnitRecord], TokenIndex]) -> TokenIndex | None:
        """Call `write_store` with all units' work, if that is done; None while others work."""
        for _ in range(ATTEMPTS - 1):
            try:
                return self._finish(write_store)
            except FileNotFoundError:  # another worker finishes at this moment and clears up
                time.sleep(PAUSE)
        return self._finish(write_store)

    def _finish(self, write_store: Callable[[UnitRecord], TokenIndex]) -> TokenIndex | None:
        whole = UnitRecord(0, last=True)
        for number in range(len(self.source.parts)):
            records = self.done(number)
            if not records or not records[-1].last:
                return self._finished_by_others()
            for record in records:
                whole.add(record)
        return write_store(whole)

    def _finished_by_others(self) -> TokenIndex | None:
        if not (self.out / "index.json").exists():
            return None
        index = TokenIndex.load(self.out)
        return None if self.old is not None and index.hash == self.old.index.hash else index


class Unit:
    """The unit in progress: its shards, one per split that occurs; used by one thread."""

    def __init__(
        self,
        ledger: Ledger,
        part_number: int,
        number: int,
        arrays: dict[str, ArraySpec],
        scales: dict[str, np.ndarray],
        thumbnails: bool,
    ) -> None:
        self.ledger, self.number = ledger, number
        self.arrays, self.scales, self.thumbnails = arrays, scales, thumbnails
        self.name = ledger.unit_name(part_number, number)
        self.path = ledger.record_path(part_number, number)
        self.seen = self.known = 0
        self.last = False
        self.lost: list[dict[str, Any]] = []
        self._shards: dict[str, ShardWriter] = {}

    def shard(self, split: str) -> ShardWriter:
        if split not in self._shards:
            check_split(split)
            folder, name = self.ledger.out, f"{split}-{self.name}"
            for stale in folder.glob(f".{name}.*.tmp"):
                stale.unlink(missing_ok=True)
            self._shards[split] = ShardWriter(
                folder, name, split, self.arrays, self.scales, self.thumbnails
            )
        return self._shards[split]

    def close(self) -> UnitRecord:
        """Bring the shards to disk, then the record: from now on the unit is finished."""
        entries = [self._shards[split].close() for split in sorted(self._shards)]
        record = UnitRecord(self.seen, self.last, entries, self.lost, self.known)
        write_synced(self.path, json.dumps(asdict(record), sort_keys=True).encode())
        return record

    def abort(self) -> None:
        """Remove what is written of a unit that will not be finished."""
        for shard in self._shards.values():
            shard.abort()


def check_rejects(work: UnitRecord, images: int, limit: float, file: Path | None = None) -> None:
    """Stop when more than the share `limit` of `images` is lost; `file` names all, if any does."""
    rejects = work.rejects
    if rejects <= limit * images:
        return
    first = next(entry for entry in work.lost if entry["image"])
    rest = f"; all are in {file}" if file is not None and rejects > 1 else ""
    raise UserError(
        f"{rejects} of {images} images can't be read, more than max_reject_fraction={limit:g}; "
        f"the first is {first['source']}: {first['reason']}{rest}"
    )
