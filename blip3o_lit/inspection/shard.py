"""One shard of a token store, read by its own tar headers and held against the index."""

from __future__ import annotations

import hashlib
import mmap
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens import tar
from blip3o_lit.tokens.index import ArraySpec, ShardEntry
from blip3o_lit.tokens.mapped_shard import scan


@dataclass
class OpenShard:
    """One tar, mapped, with the offsets that its own headers give."""

    entry: ShardEntry
    data: mmap.mmap
    offsets: np.ndarray

    def stored(self, column: int, spec: ArraySpec, sample: int) -> np.ndarray:
        """Return a view of one sample's stored numbers."""
        count = spec.nbytes // np.dtype(spec.stored).itemsize
        start = int(self.offsets[sample, column])
        return np.frombuffer(self.data, spec.stored, count, start).reshape(spec.shape)

    def key(self, sample: int) -> str:
        """Return a sample's key, from its tar header."""
        header = int(self.offsets[sample, -2]) - tar.BLOCK
        name = self.data[header : header + 100].rstrip(b"\0").decode()
        return name.removesuffix(".json")

    def metadata(self, sample: int) -> bytes:
        """Return the bytes of KEY.json."""
        start, size = (int(number) for number in self.offsets[sample, -2:])
        return self.data[start : start + size]


def shard_problem(folder: Path, entry: ShardEntry) -> str:
    """Compare a tar's size and checksum with the index; empty when both are right."""
    path = folder / entry.file
    try:
        facts = path.stat()
    except OSError as error:
        return f"{entry.file} ({entry.samples} samples) can't be read: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        return f"{entry.file} is no regular file"
    size = facts.st_size
    if size != entry.bytes:
        return f"{entry.file} has {size} bytes, index.json promises {entry.bytes}"
    if file_hash(path) != entry.sha256:
        return f"{entry.file} has another sha256 than index.json says: its content changed"
    return ""


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_shard(folder: Path, entry: ShardEntry, arrays: dict[str, ArraySpec]) -> OpenShard:
    """Map a tar and find its samples by its own headers.

    Raises:
        UserError: If it is missing or malformed.
    """
    path = folder / entry.file
    try:
        if not path.is_file():
            raise UserError(f"{entry.file} is missing or no regular file")
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{entry.file} can't be mapped ({error})") from error
    with memoryview(data) as view:
        return OpenShard(entry, data, scan(view, entry, arrays, entry.file))
