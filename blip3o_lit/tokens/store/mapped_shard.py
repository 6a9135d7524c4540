"""One token shard that is read in place: a tar mapped into memory, and its offsets."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit.base.files import FULL, replacing
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.index import (
    ArraySpec,
    ShardEntry,
    TokenIndex,
    lengths_array,
    repair_command,
    sequences_of,
)
from blip3o_lit.tokens.store.sequences import faulty
from blip3o_lit.tokens.store.shards import pack_offsets, unpack_offsets


class Shard:
    """One mapped tar and the offsets of its samples, `[samples, columns]` as in its .idx."""

    def __init__(
        self,
        folder: Path,
        entry: ShardEntry,
        index: TokenIndex,
        data: mmap.mmap,
        offsets: np.ndarray,
    ) -> None:
        self.entry, self.map, self.offsets = entry, data, offsets
        self.columns = {name: column for column, name in enumerate(index.arrays)}
        self.sizes = {n: len(self.columns) + i for i, n in enumerate(index.sequences)}
        self.arrays = index.arrays
        self._lengths: dict[str, np.ndarray] = {}
        self.bytes = np.frombuffer(data, np.uint8)
        self.repair = repair_command(folder)

    @classmethod
    def open(cls, folder: Path, entry: ShardEntry, index: TokenIndex, verify: str) -> Shard:
        """Map a tar and read its offsets; lost or damaged ones are rebuilt."""
        path = folder / entry.file
        data = map_tar(path)
        offsets_file = folder / entry.offsets
        try:
            content = offsets_file.read_bytes() if offsets_file.is_file() else b""
        except OSError as error:
            raise UserError(f"{offsets_file} can't be read ({error.strerror})") from error
        offsets = unpack_offsets(content, entry.samples, index.columns, entry.sha256)
        fix = f"restore it or {repair_command(folder)}"
        if len(data) != entry.bytes:
            lost = ""
            if offsets is not None and len(data) < entry.bytes:
                ends = offsets[:, -2] + offsets[:, -1]
                first = int(np.searchsorted(ends, len(data), "right"))
                lost = f", so samples {first} to {entry.samples - 1} of it are lost"
            raise UserError(
                f"shard {path} has {len(data)} bytes, index.json promises {entry.bytes}{lost}: "
                f"{fix}"
            )
        if verify == "full" and hashlib.sha256(data).hexdigest() != entry.sha256:
            raise UserError(
                f"shard {path} has another sha256 than index.json says: its content changed; {fix}"
            )
        if offsets is None:
            offsets = scan(data, index.arrays, index.thumbnails, str(path), entry.samples)
            # A read-only store is fine, and so is a full disk: the offsets live in memory alone.
            # Nothing waits for the disk: what a power cut leaves of them is checked when read.
            if os.access(folder, os.W_OK):
                try:
                    with replacing(offsets_file) as temporary:
                        temporary.write_bytes(pack_offsets(offsets, entry.sha256))
                except OSError as error:
                    if error.errno not in FULL:
                        raise
        return cls(folder, entry, index, data, offsets)

    @classmethod
    def by_headers(cls, folder: Path, entry: ShardEntry, index: TokenIndex) -> Shard:
        """Map a tar and find its samples by its own headers, whatever size and offsets say."""
        data = map_tar(folder / entry.file)
        offsets = scan(data, index.arrays, index.thumbnails, entry.file, entry.samples)
        return cls(folder, entry, index, data, offsets)

    def stored(self, array: str, spec: ArraySpec, sample: int) -> np.ndarray:
        """Return a read-only view of one sample's stored numbers, in the array's shape.

        Of a sequence these are all captions, one after the other: `[T, E]`.
        """
        sequence = spec.kind == "sequence"
        size = int(self.offsets[sample, self.sizes[array]]) if sequence else spec.nbytes
        content = self.content(array, sample, 0, size)
        return content.view(spec.stored).reshape((-1, *spec.shape[1:]) if sequence else spec.shape)

    def lengths(self, array: str) -> np.ndarray:
        """Return how long each caption of a sequence is, int32 `[samples, K]`, 0 behind the last.

        They are read once, and refused unless they add up to what is stored.
        """
        if array not in self._lengths:
            lengths_SK = self.stored_lengths(array)
            bad = faulty(lengths_SK, self.positions(array), self.arrays[array].shape[0])
            if bad.any():
                raise UserError(self.lengths_fault(array, int(np.flatnonzero(bad)[0])))
            self._lengths[array] = lengths_SK
        return self._lengths[array]

    def stored_lengths(self, array: str) -> np.ndarray:
        """Return the lengths of a sequence's captions, `[samples, K]`, unchecked."""
        name = lengths_array(array)
        spec, rows = self.arrays[name], range(len(self.offsets))
        return np.stack([self.stored(name, spec, sample) for sample in rows])

    def positions(self, array: str) -> np.ndarray:
        """Return how many tokens of a sequence each sample stores, `[samples]`."""
        size = np.uint64(self.arrays[array].row_bytes)
        return (self.offsets[:, self.sizes[array]] // size).astype(np.int64)

    def lengths_fault(self, array: str, sample: int) -> str:
        """Say what is wrong with a sample's lengths."""
        name = lengths_array(array)
        lengths = self.stored(name, self.arrays[name], sample).tolist()
        return (
            f"sample {self.key(sample)} in {self.entry.file}: {name} {lengths} don't describe the "
            f"{self.positions(array)[sample]} tokens of {array}: extract it again"
        )

    def content(self, array: str, sample: int, start: int, end: int) -> np.ndarray:
        """Return a read-only view of one sample's stored bytes in an array, from start to end."""
        offset = int(self.offsets[sample, self.columns[array]])
        view = self.bytes[offset + start : offset + end]
        if len(view) != end - start:
            raise UserError(
                f"{self.entry.offsets} points behind the end of {self.entry.file}: {self.repair}"
            )
        return view

    def key(self, sample: int) -> str:
        start = int(self.offsets[sample, -2]) - tar.BLOCK
        name = self.map[start : start + 100].partition(b"\0")[0]
        return name.decode().removesuffix(".json")

    def thumbnail(self, sample: int) -> bytes:
        """Return the content of a sample's KEY.jpg, of a store that has thumbnails."""
        offset, size = int(self.offsets[sample, -4]), int(self.offsets[sample, -3])
        return self.map[offset : offset + size]

    def metadata(self, sample: int) -> dict[str, Any]:
        """Return the content of a sample's KEY.json."""
        offset, size = int(self.offsets[sample, -2]), int(self.offsets[sample, -1])
        try:
            data = json.loads(self.map[offset : offset + size])
        except (ValueError, RecursionError):
            data = None
        if not isinstance(data, dict):
            raise UserError(
                f"{self.key(sample)}.json in {self.entry.file} is no JSON object: extract it again"
            )
        return data


def map_tar(path: Path) -> mmap.mmap:
    """Map a file for reading."""
    fix = f"restore it or {repair_command(path.parent)}"
    if not path.is_file():  # A pipe under that name would hang open() for ever.
        raise UserError(f"shard {path} is missing: {fix}")
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError:
        raise UserError(f"shard {path} is empty: {fix}") from None
    except OSError as error:
        raise UserError(f"shard {path} can't be read ({error.strerror}): {fix}") from error


def scan(
    data: mmap.mmap,
    arrays: dict[str, ArraySpec],
    thumbnails: bool,
    where: str,
    promise: int | None = None,
) -> np.ndarray:
    """Find the offsets `[samples, columns]` of every sample by walking a tar's headers.

    Refuses members that the index doesn't promise, and another number of samples than `promise`.
    """
    rows: list[list[int]] = []
    with memoryview(data) as view:
        for sample in tar.samples(tar.members(view, where), arrays, where, thumbnails):
            row = [sample[name].offset for name in arrays]
            row += [sample[name].size for name in sequences_of(arrays)]
            for name in tar.BESIDE:
                if name in sample:
                    row += [sample[name].offset, sample[name].size]
            rows.append(row)
    if not rows or promise not in (None, len(rows)):
        expected = "at least 1" if promise is None else promise
        raise UserError(f"{where} holds {len(rows)} whole samples, index.json promises {expected}")
    return np.array(rows, np.uint64)
