"""One token shard that is read in place: a tar mapped into memory, and its offsets."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.files import write_synced
from blip3o_lit.config.words import pasteable
from blip3o_lit.tokens import tar
from blip3o_lit.tokens.index import ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.shards import pack_offsets, unpack_offsets


class Shard:
    """One mapped tar and its offsets."""

    def __init__(self, folder: Path, entry: ShardEntry, index: TokenIndex, verify: str) -> None:
        """Map the tar, check it, and read or rebuild its offsets.

        Raises:
            UserError: If it is missing, cut off, altered or malformed.
        """
        self.entry, self.arrays = entry, index.arrays
        self.repair = f"python -m blip3o_lit.doctor {pasteable('tokens', folder)} repair=true"
        path = folder / entry.file
        offsets = path.with_name(entry.offsets)
        try:
            if not path.is_file():  # A pipe under that name would hang open() for ever.
                raise FileNotFoundError
            with open(path, "rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            content = offsets.read_bytes() if offsets.is_file() else b""
        except FileNotFoundError:
            raise UserError(f"shard {path} is missing: restore it or {self.repair}") from None
        except ValueError:
            raise UserError(f"shard {path} is empty: restore it or {self.repair}") from None
        except OSError as error:
            raise UserError(
                f"shard {path} can't be read ({error.strerror}): restore it or {self.repair}"
            ) from error
        columns = len(self.arrays) + 2
        known = unpack_offsets(content, entry.samples, columns, entry.sha256)
        if len(self.map) != entry.bytes:
            raise UserError(self._size_message(path, known))
        if verify == "full" and hashlib.sha256(self.map).hexdigest() != entry.sha256:
            raise UserError(
                f"shard {path} has another sha256 than index.json says: "
                f"its content changed; restore it or {self.repair}"
            )
        if known is None:
            known = scan(memoryview(self.map), entry, self.arrays, str(path))
            # A read-only store is fine: the offsets then live in memory alone.
            if os.access(folder, os.W_OK):
                write_synced(offsets, pack_offsets(known, entry.sha256))
        self.offsets = known
        self.bytes = np.frombuffer(self.map, np.uint8)

    def _size_message(self, path: Path, offsets: np.ndarray | None) -> str:
        found, promised = len(self.map), self.entry.bytes
        first = ""
        if offsets is not None and found < promised:
            whole = int(np.searchsorted(offsets[:, -2] + offsets[:, -1], found, "right"))
            first = f", so samples {whole} to {self.entry.samples - 1} of it are lost"
        return (
            f"shard {path} has {found} bytes, index.json promises {promised}{first}: "
            f"restore it or {self.repair}"
        )

    def content(self, column: int, sample: int, start: int, end: int) -> np.ndarray:
        """Return a read-only view of one sample's stored bytes in an array, from start to end.

        Raises:
            UserError: If the offsets point behind the shard's end.
        """
        offset = int(self.offsets[sample, column])
        view = self.bytes[offset + start : offset + end]
        if len(view) != end - start:
            raise UserError(
                f"{self.entry.offsets} points behind the end of {self.entry.file}: {self.repair}"
            )
        return view

    def key(self, sample: int) -> str:
        """Return a sample's key, from the tar header of its KEY.json."""
        start = int(self.offsets[sample, -2]) - tar.BLOCK
        name = self.map[start : start + 100].rstrip(b"\0").decode()
        return name.removesuffix(".json")

    def metadata(self, sample: int) -> dict[str, Any]:
        """Return the content of a sample's KEY.json."""
        offset, size = (int(x) for x in self.offsets[sample, -2:])
        try:
            return json.loads(self.map[offset : offset + size])
        except ValueError as error:
            raise UserError(
                f"{self.entry.file}: {self.key(sample)}.json is damaged: {self.repair}"
            ) from error


def scan(
    data: memoryview, entry: ShardEntry, arrays: dict[str, ArraySpec], where: str
) -> np.ndarray:
    """Find the offsets of every sample by walking a tar's headers.

    Raises:
        UserError: If a member is foreign, unsafe or not what the index promises.
    """
    columns = {f"{name}.npy": column for column, name in enumerate(arrays)}
    specs = list(arrays.values())
    rows: list[list[int]] = []
    row = [0] * (len(specs) + 2)
    key, left = "", 0
    for member in tar.members(data, where):
        if left == 0:
            key, left, row = member.key, len(specs) + 1, [0] * (len(specs) + 2)
        column = len(specs) if member.suffix == "json" else columns.get(member.suffix, -1)
        if member.key != key or column < 0 or row[column]:
            raise UserError(
                f"{where}: sample {key} is incomplete before member {member.name}: "
                "the shard is not the one that index.json describes"
            )
        row[column] = member.offset
        if member.suffix == "json":
            row[-1] = member.size
        else:
            spec = specs[column]
            start = bytes(data[member.offset : member.offset + tar.NPY_HEADER_LIMIT])
            skip = tar.npy_start(start, spec.stored, spec.shape, f"{where}: {member.name}")
            if member.size != skip + spec.nbytes:
                raise UserError(f"{where}: {member.name} has a wrong size: extract it again")
            row[column] += skip
        left -= 1
        if left == 0:
            rows.append(row)
    if left or len(rows) != entry.samples:
        raise UserError(
            f"{where} holds {len(rows)} whole samples, index.json promises {entry.samples}"
        )
    return np.array(rows, np.uint64)
