"""The journal of a conversion: which parts are done, so that a second run goes on from there."""

from __future__ import annotations

import fcntl
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from blip3o_lit.base.files import write_synced
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import ShardEntry

NAME = ".convert.jsonl"
OURS = re.compile(
    r"(train|validation)-\d{6}\.(tar|idx)|\..*\.tmp|rejects\.jsonl|scales\.safetensors"
)


class Journal:
    """Lines of JSON in the output folder: what is converted, then each finished part."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        """Wrap an open, locked file; `Journal.open` is the way in."""
        self.path, self._file = path, file
        self._parts: set[tuple[int, int]] = set()
        self.shards: list[ShardEntry] = []
        self.rejects: list[dict[str, Any]] = []
        self.samples = 0

    @staticmethod
    def exists(out: Path) -> bool:
        """Whether a conversion into `out` was started and not cleaned up."""
        return (out / NAME).exists()

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any]) -> Journal:
        """Start a journal, or go on with one of the same conversion.

        Raises:
            UserError: If the folder holds something else, or another process writes to it.
        """
        out.mkdir(parents=True, exist_ok=True)
        path = out / NAME
        if not path.exists():
            strange = [item.name for item in out.iterdir()]
            if strange:
                raise UserError(f"out={out} is not empty ({strange[0]}): choose a new folder")
        file = open(path, "a+b")  # noqa: SIM115 (closed in __exit__)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"out={out}: another process converts into this folder") from None
        journal = cls(path, file)
        try:
            journal._read(json.loads(json.dumps(fingerprint)))
        except BaseException:
            file.close()
            raise
        return journal

    def _read(self, fingerprint: dict[str, Any]) -> None:
        """Read finished parts; a line that a kill cut off is dropped."""
        self._file.seek(0)
        content = self._file.read()
        whole = content.rpartition(b"\n")[0]
        self._file.truncate(len(whole) + 1 if whole else 0)
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: remove its folder and start again") from error
        if not lines:
            self._append(fingerprint)
        elif lines[0] != fingerprint:
            raise UserError(
                f"out={self.path.parent} holds the beginning of another conversion (other files or "
                "options): finish that one, or choose a new folder"
            )
        for line in lines[1:]:
            self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        self._parts.add((line["file"], line["part"]))
        self.shards += [ShardEntry(**entry) for entry in line["shards"]]
        self.rejects += line["rejects"]
        self.samples += line["samples"]

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def has(self, file: int, part: int) -> bool:
        """Whether the part that starts at row `part` of a file is done."""
        return (file, part) in self._parts

    def counts(self) -> dict[str, int]:
        """Return the finished shards of each split."""
        splits = [entry.split for entry in self.shards]
        return {split: splits.count(split) for split in set(splits)}

    def add(
        self,
        file: int,
        part: int,
        samples: int,
        shards: list[ShardEntry],
        rejects: list[dict[str, Any]],
    ) -> None:
        """Record a finished part, whose shards are on disk."""
        entries = [asdict(entry) for entry in shards]
        line = {"file": file, "part": part, "samples": samples}
        line |= {"shards": entries, "rejects": rejects}
        self._append(line)
        self._take(line)

    def write_rejects(self, rejects: list[dict[str, Any]]) -> None:
        """Write rejects.jsonl, where there are any."""
        if rejects:
            text = "".join(json.dumps(reject) + "\n" for reject in rejects)
            write_synced(self.path.with_name("rejects.jsonl"), text.encode())

    def remove(self) -> None:
        """Delete the journal: the store is finished."""
        self.path.unlink()

    def __enter__(self) -> Journal:
        """Return the journal."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file, which frees its lock."""
        self._file.close()


def clear_unfinished(out: Path, journal: Journal) -> None:
    """Remove what a killed run left behind and the journal does not hold.

    Raises:
        UserError: If a file in the folder is not ours.
    """
    kept = {NAME} | {name for s in journal.shards for name in (s.file, s.offsets)}
    for path in out.iterdir():
        if path.name in kept:
            continue
        if not OURS.fullmatch(path.name):
            raise UserError(f"out={out} holds {path.name}, which is not ours: choose a new folder")
        path.unlink()
