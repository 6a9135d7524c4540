"""The bookkeeping of an extraction: units of work, their records, and the finished store.

While an extraction runs, its folder has a hidden `.extract/`: `plan.json` says what is being made,
and each finished unit of work leaves a record there, written last, after its shards are on disk.
What has a record is never done again. The process that finds every record present writes the
index and removes `.extract/`. Nothing in any file depends on time, process or worker.
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
from blip3o_lit.images.item import Source
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.shards import ShardWriter
from blip3o_lit.tokens.store.storage import SCALES_FILE

STATE = ".extract"
ATTEMPTS, PAUSE = 5, 0.5
"""Attempts to finish beside another worker that does the same, and seconds between them."""
UNITS_A_TAR = 10_000
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

    @property
    def rejects(self) -> int:
        """Images that were lost."""
        return sum(entry["image"] for entry in self.lost)

    @property
    def images(self) -> int:
        """Images that it was given: stored or lost."""
        return self.seen - len(self.lost) + self.rejects

    def to_json(self) -> bytes:
        """Return the record's file."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, content: bytes) -> UnitRecord:
        """Read a record's file."""
        data = json.loads(content)
        return cls(**{**data, "shards": [ShardEntry(**shard) for shard in data["shards"]]})


class Ledger:
    """The records of one output folder."""

    def __init__(
        self, out: Path, source: Source, recipe: dict[str, Any], shard_samples: int
    ) -> None:
        """Open the folder for this recipe, or find that it is finished.

        Args:
            out: The store's folder.
            source: The images.
            recipe: All that decides the store's content; another recipe may not go on here.
            shard_samples: Entries of one unit.

        Raises:
            UserError: If the folder holds another store, finished or not.
        """
        self.out, self.source, self.recipe = out, source, recipe
        self.shard_samples = shard_samples
        self.state = out / STATE
        self.finished = (out / "index.json").exists()
        if self.finished:
            self._same(out / "extraction.json", "a finished token store")
            shutil.rmtree(self.state, ignore_errors=True)
            return
        self.state.mkdir(parents=True, exist_ok=True)
        plan = self.state / "plan.json"
        if plan.exists() and any(self.state.glob("unit-*.json")):
            self._same(plan, "an unfinished extraction")
        write_synced(plan, json.dumps(recipe, sort_keys=True, indent=1).encode())

    def _same(self, path: Path, what: str) -> None:
        try:
            found = json.loads(path.read_bytes())
        except FileNotFoundError:
            found = {}
        recipe = json.loads(json.dumps(self.recipe))
        differing = [key for key in recipe if found.get(key) != recipe[key]]
        if differing:
            raise UserError(
                f"out={self.out} holds {what} made with another {', '.join(differing)}: "
                "choose another folder, or repeat the line that began it"
            )

    def unit_name(self, part_number: int, unit: int) -> str:
        """Return the six digits that name a unit and its shards."""
        if all(part.length is not None for part in self.source.parts):
            return f"{self._number(part_number):06d}"
        if unit >= UNITS_A_TAR:
            raise UserError(
                f"{self.source.parts[part_number].name} has over {unit * self.shard_samples} "
                "images: raise extract.shard_samples"
            )
        return f"{part_number * UNITS_A_TAR + unit:06d}"

    def _number(self, part_number: int) -> int:
        """Number a part within its split, where every part has one."""
        splits = [part.split for part in self.source.parts]
        if not all(splits):
            return part_number
        return splits[:part_number].count(splits[part_number])

    def _record_path(self, part_number: int, unit: int) -> Path:
        split = self.source.parts[part_number].split or "all"
        return self.state / f"unit-{split}-{self.unit_name(part_number, unit)}.json"

    def record(self, part_number: int, unit: int) -> UnitRecord | None:
        """Return a unit's record if it is finished and its shards are there."""
        try:
            record = UnitRecord.from_json(self._record_path(part_number, unit).read_bytes())
        except FileNotFoundError:
            return None
        for shard in record.shards:
            file = self.out / shard.file
            if not file.is_file() or file.stat().st_size != shard.bytes:
                return None
        return record

    def keep(self, part_number: int, unit: int, record: UnitRecord) -> None:
        """Write a unit's record: from now on it is finished."""
        write_synced(self._record_path(part_number, unit), record.to_json())

    def done(self, part_number: int) -> list[UnitRecord]:
        """Return the finished units of a part, in order, up to the first that is missing."""
        records: list[UnitRecord] = []
        while not (records and records[-1].last):
            found = self.record(part_number, len(records))
            if found is None:
                break
            records.append(found)
        return records

    def all_records(self) -> list[UnitRecord] | None:
        """Return every record in order, or None while one is missing."""
        records: list[UnitRecord] = []
        for number in range(len(self.source.parts)):
            found = self.done(number)
            if not found or not found[-1].last:
                return None
            records += found
        return records

    def finish(
        self,
        arrays: dict[str, ArraySpec],
        files: Callable[[], dict[str, bytes]],
        split_rule: str,
        reduced: str | None,
        max_reject_fraction: float,
    ) -> TokenIndex | None:
        """Write the index if every unit is finished; returns None while other workers work.

        Args:
            arrays: What the index describes.
            files: Makes the store's further files, by name; called when it is finished.
            split_rule: In words.
            reduced: None or grid_64.
            max_reject_fraction: Share of images that may be lost.

        Raises:
            UserError: If too many images were lost, or all.
        """
        for attempt in range(ATTEMPTS):
            try:
                return self._finish(arrays, files, split_rule, reduced, max_reject_fraction)
            except FileNotFoundError:  # another worker finishes at this moment and clears up
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(PAUSE)
        return None

    def _finish(
        self,
        arrays: dict[str, ArraySpec],
        files: Callable[[], dict[str, bytes]],
        split_rule: str,
        reduced: str | None,
        max_reject_fraction: float,
    ) -> TokenIndex | None:
        records = self.all_records()
        if records is None:
            finished = (self.out / "index.json").exists()
            return TokenIndex.load(self.out) if finished else None
        lost = [entry for record in records for entry in record.lost]
        beside = [asdict(entry) for entry in self.source.beside]
        rejects = sum(record.rejects for record in records)
        given = sum(record.images for record in records)
        shards = [shard for record in records for shard in record.shards]
        if (stored := sum(shard.samples for shard in shards)) + rejects != given:
            raise RuntimeError(f"{stored} stored and {rejects} rejected images of {given}")
        lines = [json.dumps(entry, sort_keys=True) for entry in [*beside, *lost]]
        write_synced(self.out / "rejects.jsonl", "".join(f"{line}\n" for line in lines).encode())
        check_rejects(rejects, given, max_reject_fraction, lost, self.out / "rejects.jsonl")
        order = {"train": "0", "validation": "1"}
        shards.sort(key=lambda shard: (order.get(shard.split, "2" + shard.split), shard.file))
        if not shards:
            reasons = [f"{entry['source']}: {entry['reason']}" for entry in (*lost, *beside)]
            raise UserError(
                "; ".join([f"images={self.source.name}: no image could be used", *reasons[:2]])
            )
        for leftover in self.out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        scales = self.state / SCALES_FILE
        if scales.exists():
            write_synced(self.out / SCALES_FILE, scales.read_bytes())
        for name, content in files().items():
            write_synced(self.out / name, content)
        recipe = json.dumps(self.recipe, sort_keys=True, indent=1)
        write_synced(self.out / "extraction.json", recipe.encode())
        index = TokenIndex(arrays, shards, reduced, split_rule, rejects)
        index.write(self.out)
        shutil.rmtree(self.state, ignore_errors=True)
        return index


class UnitFiles:
    """The shards of the unit in progress, one for each split that occurs; used by one thread."""

    def __init__(
        self,
        ledger: Ledger,
        part_number: int,
        unit: int,
        arrays: dict[str, ArraySpec],
        scales: dict[str, np.ndarray],
    ) -> None:
        """Prepare a unit; no file is opened before its first sample."""
        self.ledger, self.part_number, self.unit = ledger, part_number, unit
        self.arrays, self.scales = arrays, scales
        self.name = ledger.unit_name(part_number, unit)
        self.seen = 0
        self.last = False
        self.lost: list[dict[str, Any]] = []
        self._shards: dict[str, ShardWriter] = {}

    def shard(self, split: str) -> ShardWriter:
        """Return the open shard of a split.

        Raises:
            UserError: If the source's name of a split can't be part of a file name.
        """
        if split not in self._shards:
            if not tar.KEY_CHARACTERS.issuperset(split):
                raise UserError(f"split name {split!r} may hold letters, digits, - and _ alone")
            name = f"{split}-{self.name}"
            for stale in self.ledger.out.glob(f".{name}.*.tmp"):
                stale.unlink(missing_ok=True)
            self._shards[split] = ShardWriter(
                self.ledger.out, name, split, self.arrays, self.scales
            )
        return self._shards[split]

    def close(self) -> UnitRecord:
        """Bring the shards to disk, then the record."""
        entries = [self._shards[split].close() for split in sorted(self._shards)]
        record = UnitRecord(self.seen, self.last, entries, self.lost)
        self.ledger.keep(self.part_number, self.unit, record)
        return record


def check_rejects(
    rejects: int, images: int, limit: float, lost: list[dict[str, Any]], file: Path | None = None
) -> None:
    """Stop when more than the share `limit` of all images could not be read.

    Args:
        rejects: How many could not.
        images: How many were given.
        limit: The share.
        lost: Entries of rejects.jsonl, the first lost image's among them.
        file: Where all of them stand, if anywhere.

    Raises:
        UserError: Naming the first of them and its reason.
    """
    if rejects <= limit * images:
        return
    first = next(entry for entry in lost if entry["image"])
    rest = f"; all are in {file}" if file is not None and rejects > 1 else ""
    raise UserError(
        f"{rejects} of {images} images can't be read, more than max_reject_fraction={limit:g}; "
        f"the first is {first['source']}: {first['reason']}{rest}"
    )
