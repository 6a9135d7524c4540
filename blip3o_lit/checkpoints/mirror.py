"""A run's files copied to a bucket while it trains, and a run that goes on from such a copy.

The run directory stays what counts: what can't be copied is told in a line and tried again after
the next save, and training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from obstore.exceptions import BaseError

from blip3o_lit.base.files import one_at_a_time, replacing
from blip3o_lit.base.home import home
from blip3o_lit.base.objects import PAUSES, Objects, why
from blip3o_lit.base.secrets import masked
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.sharded import PLAIN
from blip3o_lit.checkpoints.snapshots import FOLDER as AVERAGES
from blip3o_lit.config.errors import UserError

log = logging.getLogger("blip3o_lit")
CHECKPOINTS = "checkpoints"
Mark = tuple[int, int, int]
"""Inode, size and time of change: files of equal marks have the same content."""


class Mirror:
    """Copies what is new in a run directory, one round at a time, in a thread."""

    def __init__(self, run_dir: Path, address: str) -> None:
        self.run_dir, self.address = run_dir, masked(address)
        self._objects = Objects(address)
        self._copied: dict[str, Mark] = {}
        self._pool = ThreadPoolExecutor(1, "mirror")
        self._round: Future[bool] | None = None

    def begin(self, fresh: bool, overwrite: bool) -> None:
        """Refuse an address that can't be written, or that holds a run where this one is new."""
        there = self._objects.below(CHECKPOINTS)
        if fresh and there and not overwrite:
            raise UserError(
                f"checkpoint.mirror={self.address} holds a run already: go on with it by "
                f"resume={self.address}, or choose another address"
            )
        try:
            for name in there if fresh else ():
                self._objects.delete(name)
            self._put("config.yaml")
        except (BaseError, OSError) as error:
            reason, mend, passing = why(error)
            if not passing:
                raise UserError(
                    f"checkpoint.mirror={self.address} can't be written ({reason}): {mend}"
                ) from error
            self._warn("config.yaml", error)

    def changed(self) -> None:
        """Copy what is new, after the round that is under way."""
        if self._round is None or self._round.done() or self._round.running():
            self._round = self._pool.submit(self._copy)

    def finish(self) -> None:
        """Copy the rest and wait for it; tell where that fails for good."""
        for pause in (*PAUSES, 0.0):
            if self._pool.submit(self._copy).result():
                break
            time.sleep(pause)
        self._pool.shutdown()
        missing = [name for name, mark in self._files() if self._copied.get(name) != mark]
        if missing:
            self._say(
                f"checkpoint.mirror={self.address} lacks {len(missing)} files of this run, which "
                f"is whole in {self.run_dir}"
            )

    def _copy(self) -> bool:
        """Copy new and changed files, then remove those that are gone; False if one failed."""
        for name, mark in self._files():
            if self._copied.get(name) == mark:
                continue
            twin = next((other for other, known in self._copied.items() if known == mark), None)
            try:
                if twin is None:
                    self._put(name)
                else:
                    self._objects.copy(twin, name)
                    self._copied[name] = mark
            except FileNotFoundError:
                continue  # removed meanwhile: a later round sees to that
            except (BaseError, OSError) as error:
                self._warn(name, error)
                return False
        kept = {name for name, _ in self._files()}
        for name in [name for name in self._copied if name not in kept]:
            try:
                self._objects.delete(name)
            except (BaseError, OSError) as error:
                self._warn(name, error)
                return False
            del self._copied[name]
        return True

    def _put(self, name: str) -> None:
        file = self.run_dir / name
        mark = _mark(file)
        self._objects.put(file, name)
        self._copied[name] = mark

    def _files(self) -> list[tuple[str, Mark]]:
        """Return the run's files: checkpoints by step, best and last, then all others."""
        found = []
        for folder, folders, names in os.walk(self.run_dir):
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in names:
                path = Path(folder) / name
                if name.startswith("."):
                    continue
                with suppress(FileNotFoundError):  # removed meanwhile
                    found.append((path.relative_to(self.run_dir).as_posix(), _mark(path)))
        return sorted(found, key=lambda item: _rank(item[0]))

    def _warn(self, name: str, error: Exception) -> None:
        reason, mend, _ = why(error)
        self._say(
            f"checkpoint.mirror={self.address}: {name} was not copied ({reason}): {mend}; it is "
            "tried again after the next save"
        )

    def _say(self, text: str) -> None:
        log.warning(text)
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _mark(path: Path) -> Mark:
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _rank(name: str) -> tuple[int, int, str]:
    """Order names so that a copy which ends anywhere can be gone on from."""
    folder, _, rest = name.partition("/")
    if folder != CHECKPOINTS:
        return 2, 0, name
    own = rest.partition("/")[0]
    return int(own in ("best.ckpt", "last.ckpt")), int(rest.endswith(f"/{PLAIN}")), name


def fetched(address: str) -> Path:
    """Return a checkpoint of a run's copy, or the newest sound one of it, in the user's cache."""
    address = address.rstrip("/")
    if address.endswith(".ckpt"):
        parent, _, name = address.rpartition("/")
        file = _fetched(Objects(parent), name)
        if file is None:
            raise UserError(f"resume={masked(address)}: no such checkpoint")
        checkpointing.check_sound(file)
        return file
    objects = Objects(address)
    names = {"/".join(name.split("/")[:2]) for name in objects.below(CHECKPOINTS)}
    steps = sorted((n for n in names if checkpointing.step_of(Path(n)) >= 0), reverse=True)
    for name in [*steps, *(names & {f"{CHECKPOINTS}/last.ckpt"})]:
        file = _fetched(objects, name)
        if file is not None and checkpointing.is_sound(file):
            return file
        print(f"resume={masked(address)} passes over a damaged checkpoint: {name}")
    raise UserError(f"resume={masked(address)}: no sound checkpoint of a run is there")


def _fetched(objects: Objects, name: str) -> Path | None:
    """Fetch a checkpoint, file or folder, once for all processes; older ones are removed."""
    files = {
        file: facts
        for file, facts in objects.below(name.rpartition("/")[0]).items()
        if file == name or file.startswith(f"{name}/")
    }
    if files and "/" in name:  # of a run's copy: what the run has stored of its averages, too
        files |= objects.below(AVERAGES)
    if not files:
        return None
    place = home() / "mirrors" / hashlib.sha256(f"{objects.url}/{name}".encode()).hexdigest()[:32]
    folder = place / hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()[:32]
    with one_at_a_time(place):
        for other in place.glob("*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)
        for file, (size, _) in sorted(files.items(), key=lambda item: _rank(item[0])):
            path = folder / file
            if path.is_file():
                continue
            with replacing(path) as temporary, temporary.open("r+b") as out:
                if objects.download(file, out.fileno(), size) != size:
                    raise UserError(f"{objects.url}/{file} is being changed: try again")
    return folder / name
