"""Shards of remote stores in a local folder: fetched whole, once a node, oldest use removed first.

`shards/` holds files named by their sha256, so a store that has grown is not fetched anew. Where
the index has a crc32, that is what is checked, in less time; as it can be forged, such a file has a
mark of its store's address in its name too, and serves other addresses once its sha256 is checked.
What is being fetched is `NAME.part`, locked by who fetches it; it becomes `NAME.tar` when it is
whole, checked and on the disk. Readers hold a shared lock on a tar while it is mapped, and what is
locked is never removed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from blip3o_lit.base.files import FULL
from blip3o_lit.base.objects import Objects
from blip3o_lit.base.units import human_time
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.checksums import mismatch
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.store.mapped_shard import Shard

FETCHES = 4
"""Shards that a process downloads at a time; what came is checked and synced meanwhile."""
PATIENCE = 600.0
"""Seconds to wait for room where all shards of a full cache are in use by other processes."""
POLL = 0.005
"""Seconds between two looks at what another process fetches or uses."""
OURS = re.compile(r"[0-9a-f]{64}(-[0-9a-f]{32})?\.(tar|part)").fullmatch


class _GivenUp(Exception):
    """The reader for whom a shard was fetched ahead is gone."""


class ShardCache:
    """The shards of one store in a folder that holds at most `limit` bytes of tars of all stores.

    `ahead` is how many shards are fetched before they are read.
    """

    def __init__(self, folder: Path, objects: Objects, limit: int = 0, ahead: int = 32) -> None:
        self.folder, self.objects, self.limit, self.ahead = folder, objects, limit, ahead
        self.address = objects.url
        self._own = hashlib.sha256(self.address.encode()).hexdigest()[:32]
        self.shards = folder / "shards"
        self._failed: dict[str, UserError] = {}
        self._turns = threading.Semaphore(FETCHES)
        with self._readable():
            self.shards.mkdir(parents=True, exist_ok=True)

    def used(self) -> int:
        """Return the bytes of all tars, those that are being fetched included."""
        return sum(stat.st_size for _, stat in self._files())

    def path(self, entry: ShardEntry) -> Path:
        """Return where a shard is, or is to be."""
        path = self.shards / f"{entry.sha256}.tar"
        if not entry.crc32 or path.exists():
            return path
        return path.with_stem(f"{entry.sha256}-{self._own}")

    def holds(self, entry: ShardEntry) -> bool:
        """Return whether a shard is there, and count that as a use."""
        try:
            os.utime(self.path(entry))
        except FileNotFoundError:
            return False
        except OSError:  # of another user, or on a disk that is read only: it is not counted
            return True
        return True

    def hold(self, entry: ShardEntry, let_go: Callable[[], object] = int) -> BinaryIO:
        """Return a shard's open file, fetched if need be; it stays while that is open.

        Waits where another process fetches it. Where a full cache is in use, `let_go` is asked to
        close what this process has open, then other processes are waited for.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            if (error := self._failed.pop(entry.sha256, None)) is not None:
                raise error
            file = self._held(entry)
            if file is not None:
                return file
            if self._fetch(entry, True, lambda: False):
                continue
            let_go()
            if time.monotonic() > deadline:
                raise UserError(
                    f"data.cache={self.folder}: all of data.cache_gb={self.limit / 1e9:g} was in "
                    f"use for {human_time(PATIENCE)}: give more"
                )
            time.sleep(POLL)

    def mapped(self, entry: ShardEntry, index: TokenIndex, verify: str, held: BinaryIO) -> Shard:
        """Map a shard, whose file is held as long as it is mapped."""
        path = self.path(entry)
        own = replace(entry, file=path.name, offsets=path.with_suffix(".idx").name)
        try:
            shard = Shard.open(self.shards, own, index, verify)
        except BaseException:
            held.close()
            raise
        shard.entry = entry
        weakref.finalize(shard, held.close)
        return shard

    def fetch_ahead(self, entry: ShardEntry, ended: Callable[[], bool]) -> bool:
        """Fetch a shard unless that is being done; return False where there is no room for it now.

        What fails is raised when the shard is asked for. It is given up once `ended` says so.
        """
        if self.holds(entry):
            return True
        try:
            return self._fetch(entry, False, ended)
        except _GivenUp:
            return True
        except UserError as error:
            self._failed[entry.sha256] = error
            return True

    def _held(self, entry: ShardEntry) -> BinaryIO | None:
        """Return the open file of a shard that is there whole, under a shared lock."""
        path = self.path(entry)
        with self._readable():
            try:
                file = path.open("rb")
            except FileNotFoundError:
                return None
            fcntl.flock(file, fcntl.LOCK_SH)
            now = os.fstat(file.fileno())
            if now.st_nlink and now.st_size == entry.bytes:
                self.holds(entry)
                return file
            file.close()
            if now.st_nlink:  # cut off since it was put there
                path.unlink(missing_ok=True)
        return None

    def _fetch(self, entry: ShardEntry, wait: bool, ended: Callable[[], bool]) -> bool:
        """Bring a shard into the cache, or see it come; return False where there is no room."""
        path = self.path(entry)
        part = path.with_suffix(".part")
        with self._readable(), _opened(part) as file:
            # Once it is whole its readers keep it locked: a wait for the lock could last for ever.
            while not _locked(file):
                if not (wait and _is_named(file, part)):
                    return True
                time.sleep(POLL)
            if not _is_named(file, part):
                return True  # another process was faster, or has given up
            if path.exists() or self._adopted(entry):
                part.unlink(missing_ok=True)
                return True
            try:
                file.truncate(0)
                if not self._make_room(entry.bytes, file):
                    part.unlink()
                    return False
                with self._turns:
                    self._download(entry, file, ended)
                self._check(entry, file)
                os.fsync(file.fileno())
                part.rename(path)  # a name that a power cut takes is fetched again
            except BaseException:
                part.unlink(missing_ok=True)
                raise
        return True

    def _adopted(self, entry: ShardEntry) -> bool:
        """Let a shard that is there from another address serve all, if its sha256 is right.

        One that is being read keeps its name, and is passed over.
        """
        whole = self.shards / f"{entry.sha256}.tar"
        for path in self.shards.glob(f"{entry.sha256}-*.tar"):
            with suppress(FileNotFoundError, PermissionError), path.open("rb") as file:
                if not _locked(file) or not _is_named(file, path):
                    continue
                if hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256:
                    path.rename(whole)
                    with suppress(FileNotFoundError):
                        path.with_suffix(".idx").rename(whole.with_suffix(".idx"))
                    return True
        return False

    def _download(self, entry: ShardEntry, file: BinaryIO, ended: Callable[[], bool]) -> None:
        """Write a shard's bytes into its file."""
        size = entry.bytes
        try:
            got = self.objects.download(entry.file, file.fileno(), size, ended)
        except UserError as error:
            raise self._sized(entry) or error from error
        if ended():
            raise _GivenUp
        if got != size:
            raise self._sized(entry) or self._wrong(entry, f"it has not {size} bytes")

    def _check(self, entry: ShardEntry, file: BinaryIO) -> None:
        """Refuse a shard whose file, which is whole, holds other bytes."""
        with mmap.mmap(file.fileno(), entry.bytes, access=mmap.ACCESS_READ) as content:
            wrong = mismatch(content, entry.sha256, entry.crc32)
            if wrong:
                raise self._wrong(entry, f"its {wrong} is another than index.json says")

    def _sized(self, entry: ShardEntry) -> UserError | None:
        """Return the error of a shard that has another size than the index promises."""
        size = self.objects.size(entry.file)
        if size is None or size == entry.bytes:
            return None
        return self._wrong(entry, f"it has {size} bytes, index.json promises {entry.bytes}")

    def _wrong(self, entry: ShardEntry, what: str) -> UserError:
        where = f"{self.objects.url}/{entry.file}"
        return UserError(f"{where} is not the shard of its store ({what}): copy it there again")

    def _make_room(self, size: int, file: BinaryIO) -> bool:
        """Give the file its size, which counts from now on, removing what there is no room for."""
        with (self.folder / ".lock").open("a+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            own = os.fstat(file.fileno()).st_ino
            files = [(path, stat) for path, stat in self._files() if stat.st_ino != own]
            excess = sum(stat.st_size for _, stat in files) + size - self.limit
            oldest = iter(sorted(files, key=lambda item: item[1].st_mtime_ns))
            while excess > 0:
                freed = self._remove_one(oldest)
                if not freed:
                    return False
                excess -= freed
            while True:
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                    return True
                except OSError as error:  # The disk is fuller than the limit lets hope.
                    if error.errno not in FULL or not self._remove_one(oldest):
                        raise

    def _remove_one(self, oldest: Iterator[tuple[Path, os.stat_result]]) -> int:
        """Remove the next file that nobody uses and return its size; 0 where all are in use."""
        for path, stat in oldest:
            try:
                with path.open("r+b") as file:
                    if not _locked(file) or not _is_named(file, path):
                        continue
                    path.unlink()
                    path.with_suffix(".idx").unlink(missing_ok=True)
            except (PermissionError, FileNotFoundError):
                continue
            if stat.st_size:
                return stat.st_size
        return 0

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield the tars, and what is left of those whose fetching was killed."""
        for entry in os.scandir(self.shards):
            if OURS(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(FileNotFoundError):
                    yield Path(entry.path), entry.stat(follow_symlinks=False)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """Say in one line what the folder or its file system refuses."""
        try:
            yield
        except UserError:
            raise
        except OSError as error:
            fix = "choose another data.cache"
            if error.errno in FULL:
                fix = "lower data.cache_gb or choose another data.cache"
            elif error.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                fix = "its file system has no locks: choose another data.cache"
            raise UserError(f"data.cache={self.folder}: {error.strerror}: {fix}") from error


def _locked(file: BinaryIO) -> bool:
    """Lock a file for this open file alone, or return False."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _opened(path: Path) -> BinaryIO:
    """Open a file for writing at any place, made where it is not there, its content kept."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # type: ignore[return-value]


def _is_named(file: BinaryIO, path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False
