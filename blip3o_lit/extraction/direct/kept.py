"""`data.keep`: a store that a run makes of its pictures in its first epoch, and reads.

A shard that is needed and not there yet is made as `extract` makes it: the same unit of work, the
same record, the same bytes. So a step takes the same tokens whenever they were stored, a run that
was killed goes on with the units that are finished, and what is left in the end is a plain store.
Ranks share the folder; each unit is made by the first that needs it, and the others wait for it.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import BinaryIO

from blip3o_lit.base.files import check_disk, room_on_disk, write_synced
from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.home import expanded
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.extraction.direct.datamodule import tower_device
from blip3o_lit.extraction.direct.store import PictureStore, load_pair
from blip3o_lit.extraction.engine import Extraction
from blip3o_lit.extraction.pipeline import Pipeline
from blip3o_lit.extraction.units import UnitRecord
from blip3o_lit.tokens.datamodule import TRAIN, TokenDataModule, run_settings
from blip3o_lit.tokens.reading.store_set import StoreSet
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.towers.tower import tower_cost

KEY = "data.keep"
POLL = 0.02
"""Seconds between two looks at a unit that another process makes."""


class KeptShards:
    """Supplies the shards of a store of pictures, making those that are not there."""

    limit = 0

    def __init__(self, config: TrainConfig, device: str, ranks: FirstRank = ALONE) -> None:
        """Look at the pictures and open the folder; towers are loaded where it is not complete."""
        data = config.data
        self.config, self.device, self.ahead = config, device, 2 * data.shuffle_window
        self.folder = expanded(data.keep or "")
        self.address = str(self.folder)
        self.pictures = pictures = PictureStore(config, device, ranks=ranks)
        self.parts = pictures.listing.parts
        engine = EngineConfig(
            data.tower_batch or EngineConfig.batch_size,
            data.threads,
            shard="0/1",
            device=device,
        )
        self.extraction = Extraction(
            replace(pictures.listing.source, parts=[*self.parts]),
            pictures.shapes.towers,
            self.folder,
            ExtractConfig(
                towers=config.towers,
                split=config.split,
                pixels=config.pixels,
                extract=engine,
                storage=data.keep_storage,
            ),
            key=KEY,
        )
        self.ledger = self.extraction.ledger
        self._making = threading.Lock()
        self._failed: dict[str, UserError] = {}
        self._written: dict[str, ShardEntry] = {}
        """Shards that are there, by what stands for their sha256 in the index."""
        training = {shard.part for shard in pictures.shards if shard.split == TRAIN}
        self._beside = set(range(len(self.parts))) - training
        self._left = [*self._beside, *sorted(training, reverse=True)]
        """Parts not known to be made; the last come first."""
        if self.complete:
            arrays = TokenIndex.load(self.folder).arrays
        else:
            self._check_room()
            with room_on_disk(f"{KEY}={self.folder}"):
                arrays = self.pipeline.arrays
        rule = self.extraction.split_rule
        self.index = TokenIndex(arrays, self._entries(), split_rule=rule, thumbnails=True)
        if not ranks.rank:
            with self._making, room_on_disk(f"{KEY}={self.folder}"):
                self._finish(lambda: False)

    def _entries(self) -> list[ShardEntry]:
        """Return the shards under the names that they will have; sizes are not known yet."""
        self._units: dict[str, int] = {}
        self._names: dict[str, str] = {}
        entries = []
        for entry, shard in zip(self.pictures.index.shards, self.pictures.shards):
            name = f"{shard.split}-{self.ledger.unit_name(shard.part, 0)}"
            entries.append(replace(entry, file=f"{name}.tar", offsets=f"{name}.idx"))
            self._units[entry.sha256] = shard.part
            self._names[f"{name}.tar"] = entry.sha256
        return entries

    @property
    def complete(self) -> bool:
        """Whether all is made."""
        return (self.folder / "index.json").exists()

    @cached_property
    def pipeline(self) -> Pipeline:
        """The towers with their weights, and what stores their tokens."""
        config = self.config
        low = all(t.precision != "fp32" for t in (config.towers.condition, config.towers.target))
        if config.precision.name == "tf32" and not low:
            raise UserError(
                f"{KEY} with precision=tf32: towers in fp32 would be rounded too: give both "
                "towers.*.precision=bf16 or fp16, or precision=bf16"
            )
        towers = load_pair(config.towers, self.device)
        self.extraction.towers = self.extraction.tower_set(towers)  # type: ignore[arg-type]
        pipeline = self.extraction.pipeline()
        for name, content in self.extraction.files().items():
            if not (self.folder / name).is_file():
                write_synced(self.folder / name, content)
        return pipeline

    def _check_room(self) -> None:
        """Stop before anything is made where the disk can't hold all."""
        if self.config.data.subset or self.config.data.max_shards:
            return
        made = set(os.listdir(self.ledger.state))
        numbers = range(len(self.parts))
        missing = (n for n in numbers if self.ledger.record_path(n, 0).name not in made)
        images = sum(self.parts[number].length for number in missing)
        needed = images * self.extraction.towers.sample_bytes
        fix = "free some, choose another folder or data.keep_storage=int8, or leave data.keep out"
        check_disk(self.folder, needed, f"the tokens of {images} images take", fix, KEY)

    def hold(self, entry: ShardEntry, let_go: Callable[[], object] = int) -> BinaryIO:
        """Return a shard's open file, made if need be; waits where another process makes it."""
        while True:
            if (error := self._failed.pop(entry.sha256, None)) is not None:
                raise error
            written = self._found(entry)
            if written is not None:
                return (self.folder / written.file).open("rb")
            if not self._make(self._units[entry.sha256], lambda: False):
                time.sleep(POLL)

    def mapped(self, entry: ShardEntry, index: TokenIndex, verify: str, held: BinaryIO) -> Shard:
        """Map a shard, whose file stays whoever holds it."""
        held.close()
        return Shard.open(self.folder, self._written[entry.sha256], index, verify)

    def holds(self, entry: ShardEntry) -> bool:
        """Return whether a shard is made; of one that is wrong too, which `hold` says."""
        try:
            return self._found(entry) is not None
        except UserError:
            return True

    def fetch_ahead(self, entry: ShardEntry, ended: Callable[[], bool]) -> bool:
        """Make a shard unless another process does. What fails is raised when it is asked for."""
        try:
            if self._found(entry) is None:
                self._make(self._units[entry.sha256], ended)
        except UserError as error:
            self._failed[entry.sha256] = error
        return True

    def _found(self, entry: ShardEntry) -> ShardEntry | None:
        """Return a shard's entry as it was written; None where it is still to be made."""
        if entry.sha256 not in self._written:
            records = self.ledger.done(self._units[entry.sha256])
            if records:
                shards = records[0].shards
            elif self.complete:
                shards = TokenIndex.load(self.folder).shards
            else:
                return None
            names = self._names
            self._written |= {names[one.file]: one for one in shards if one.file in names}
        written = self._written.get(entry.sha256)
        if written is None or written.samples != entry.samples:
            raise UserError(f"{KEY}={self.folder}: {entry.file} is of other images: remove it")
        return written

    def _make(self, number: int, ended: Callable[[], bool]) -> bool:
        """Make a part's unit; return False where another process does, or once `ended` says so."""
        with self._making, room_on_disk(f"{KEY}={self.folder}"):
            done = self._unit(number, ended)
            self._finish(ended)
        return done

    def _unit(self, number: int, ended: Callable[[], bool]) -> bool:
        with self._claimed(number) as mine:
            if not mine or ended():
                return False
            if self.ledger.done(number):
                return True
            part = self.parts[number]
            with closing(self.pipeline.run([(number, part)], {number: []})) as work:
                for _, record in work:
                    if record is not None:
                        self._check(number, record)
                    elif ended():
                        return False
        return True

    def _check(self, number: int, record: UnitRecord) -> None:
        """Refuse a unit that has other images than the pictures had when they were looked at."""
        known = {(s.split, len(s.items)) for s in self.pictures.shards if s.part == number}
        if {(shard.split, shard.samples) for shard in record.shards} == known:
            return
        self.ledger.record_path(number, 0).unlink()
        lost = "".join(f" ({entry['source']}: {entry['reason']})" for entry in record.lost[:1])
        raise UserError(
            f"data.images={self.config.data.images}: images {self.parts[number].name} have changed "
            f"since they were looked at{lost}: restore them, or start a new run"
        )

    def _finish(self, ended: Callable[[], bool]) -> None:
        """Once what is trained on is made, make the rest; the index comes last."""
        while self._left and not self.complete:
            number = self._left[-1]
            made = bool(self.ledger.done(number))
            if not made and number in self._beside:
                made = self._unit(number, ended)
            if not made:
                return
            self._left.pop()
        if not self.complete:
            self.extraction.finish(self.pipeline.arrays)
        self.__dict__.pop("pipeline", None)  # and with it the towers

    @contextmanager
    def _claimed(self, number: int) -> Iterator[bool]:
        """Hold a unit so that no other process makes it; yields whether that was possible."""
        path = self.ledger.record_path(number, 0).with_suffix(".lock")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # all is made, and the records are gone
            yield False
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine = True
            except BlockingIOError:
                mine = False
            except OSError as error:
                raise UserError(
                    f"{KEY}={self.folder}: its file system has no locks ({error.strerror}): choose "
                    "another folder"
                ) from error
            yield mine
        finally:
            os.close(descriptor)


def kept_store(config: TrainConfig, device: str, ranks: FirstRank = ALONE) -> TokenStore:
    """Open the store in `data.keep`, whatever of it is made yet."""
    kept = KeptShards(config, device, ranks)
    return TokenStore(kept.folder, kept.index, config.data.verify, kept)


class KeptDataModule(TokenDataModule):
    """Token pairs of pictures, stored in `data.keep` by the time that they are first read."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(store=config.data.keep or "", **run_settings(config))
        self.config = config

    def open(self, ranks: FirstRank = ALONE) -> None:
        """Open the folder, and make what the statistics need."""
        super().open(ranks)
        self.facts["images"] = self.kept.pictures.listing.hash

    def _stores(self, ranks: FirstRank) -> StoreSet:
        store = kept_store(self.config, tower_device(self.config), ranks)
        assert isinstance(store.supply, KeptShards)
        self.kept = store.supply
        return StoreSet(self.stores, self.data, lambda *_: store)

    @property
    def tower_bytes(self) -> int:
        """Memory of the towers, which a process needs until all is made."""
        towers = self.kept.pictures.shapes.towers.values()
        return 0 if self.kept.complete else sum(tower_cost(tower).bytes for tower in towers)
