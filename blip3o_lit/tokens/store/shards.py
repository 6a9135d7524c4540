"""Token shards: the writer that makes a store, and the format of its tars and offset files.

A store is a folder with `index.json`, tars `<split>-NNNNNN.tar`, their offsets `.idx`, and
optionally `heads.safetensors`. A tar belongs to one split and holds, per sample, KEY.<array>.npy in
the index's order, KEY.jpg where the store has thumbnails, then KEY.json. Any WebDataset tool can
read it; `reader.py` reads it by offset.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from blip3o_lit.base.files import sync_folder, temporary_name, write_synced
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.checksums import Checksums
from blip3o_lit.tokens.store.index import (
    KEY_CHARACTERS,
    ArraySpec,
    ShardEntry,
    TokenIndex,
    check_array_name,
    check_lengths_arrays,
    check_split,
    sequences_of,
)
from blip3o_lit.tokens.store.int8 import load_scales, save_scales, with_token_scales
from blip3o_lit.tokens.store.storage import encode

OFFSETS_MAGIC = b"tokidx01"


def pack_offsets(offsets: np.ndarray, sha256: str) -> bytes:
    """Return the content of an .idx file.

    Four words of 8 bytes (magic, samples, columns, start of the tar's sha256), then
    `[samples, columns]` u64: first byte of each array's numbers, size of each sequence's numbers,
    first byte and size of KEY.jpg where there is one, first byte and size of KEY.json; then 8 bytes
    of a sha256 of all this.
    """
    samples, columns = offsets.shape
    body = _offsets_head(samples, columns, sha256) + offsets.astype("<u8").tobytes()
    return body + hashlib.sha256(body).digest()[:8]


def _offsets_head(samples: int, columns: int, sha256: str) -> bytes:
    return OFFSETS_MAGIC + np.array([samples, columns], "<u8").tobytes() + bytes.fromhex(sha256)[:8]


def unpack_offsets(content: bytes, samples: int, columns: int, sha256: str) -> np.ndarray | None:
    """Return the `[samples, columns]` offsets, or None when the file is not this shard's."""
    body, check = content[:-8], content[-8:]
    head = _offsets_head(samples, columns, sha256)
    size = len(head) + 8 * samples * columns
    if len(body) != size or not body.startswith(head) or hashlib.sha256(body).digest()[:8] != check:
        return None
    return np.frombuffer(body, "<u8", offset=len(head)).reshape(samples, columns)


class ShardWriter:
    """Writes one tar and its offsets through temporary names; `close` makes both appear.

    `scales` are the channel scales `[N, C]` of int8 arrays.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        split: str,
        arrays: dict[str, ArraySpec],
        scales: dict[str, np.ndarray] | None = None,
        thumbnails: bool = False,
    ) -> None:
        self.folder, self.name, self.split = folder, name, split
        self.arrays, self.scales = arrays, scales or {}
        self.thumbnails = thumbnails
        self._temporary = temporary_name(folder / f"{name}.tar")
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 (closed in close/abort)
        self._sums = Checksums()
        self._position = 0
        self._rows: list[list[int]] = []
        self._keys: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def _put(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._file.write(part)
            self._sums.update(part)
            self._position += len(part)

    def add(
        self,
        key: str,
        arrays: dict[str, np.ndarray],
        metadata: dict[str, Any],
        thumbnail: bytes | None = None,
    ) -> None:
        """Append one sample, or nothing of it where the key, an array or a number is refused."""
        self.add_stored(key, encode(arrays, self.arrays, self.scales, key), metadata, thumbnail)

    def add_stored(
        self,
        key: str,
        stored: dict[str, np.ndarray],
        metadata: dict[str, Any],
        thumbnail: bytes | None = None,
    ) -> None:
        """Append one sample whose arrays are as they are stored, in the index's order."""
        if not key or len(key) > 60 or not KEY_CHARACTERS.issuperset(key):
            raise UserError(f"sample key {key!r}: use 1 to 60 letters, digits, - and _")
        if key in self._keys:
            raise UserError(f"sample key {key} appears twice in {self.name}.tar")
        text = json.dumps(metadata, sort_keys=True, ensure_ascii=False).encode()
        if len(text) > tar.JSON_LIMIT:
            raise UserError(f"sample {key}: its caption and metadata exceed 1 MiB")
        if (thumbnail is not None) != self.thumbnails:
            raise UserError(f"sample {key}: either all samples of a store have a thumbnail or none")
        self._keys.add(key)
        row = []
        for name, value in stored.items():
            start = tar.npy_header(value.dtype.str, value.shape)
            size = len(start) + value.nbytes
            self._put(tar.header(f"{key}.{name}.npy", size), start)
            row.append(self._position)
            content = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            self._put(content.data, tar.padding(size))
        row += [stored[name].nbytes for name in sequences_of(self.arrays)]
        beside = {"json": text} if thumbnail is None else {"jpg": thumbnail, "json": text}
        for suffix, content in beside.items():
            self._put(tar.header(f"{key}.{suffix}", len(content)))
            row += [self._position, len(content)]
            self._put(content, tar.padding(len(content)))
        self._rows.append(row)

    def close(self) -> ShardEntry:
        """Finish, sync and rename; return the shard's entry for the index."""
        self._put(tar.END)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        sums = self._sums
        offsets = pack_offsets(np.array(self._rows, np.uint64), sums.sha256)
        tar_name, idx_name = f"{self.name}.tar", f"{self.name}.idx"
        write_synced(self.folder / idx_name, offsets)
        self._temporary.replace(self.folder / tar_name)
        sync_folder(self.folder)
        facts = self.split, len(self), self._position, sums.sha256, sums.crc32
        return ShardEntry(tar_name, idx_name, *facts)

    def abort(self) -> None:
        """Remove what is written."""
        with suppress(OSError):  # what is still to be written may find no room
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class TokenWriter:
    """Writes a store into a folder: samples in, shards and, last of all, index.json out.

    `int8.fit_int8` gives the specs of int8 arrays and their channel `scales` `[K, C]`;
    `reduced` is `grid_64` for a store of 64 averaged tokens. With `thumbnails` every sample has a
    JPEG. What a sequence and its lengths are of some captions says `sequences.packed`.

    Example:
        with TokenWriter(folder, {"eva": spec, "clip": spec}) as writer:
            writer.add("train", "000017", {"eva": eva, "clip": clip}, caption="a red seven")
    """

    def __init__(
        self,
        out: Path | str,
        arrays: dict[str, ArraySpec],
        shard_samples: int = 256,
        reduced: str | None = None,
        split_rule: str = "",
        scales: dict[str, np.ndarray] | None = None,
        thumbnails: bool = False,
    ) -> None:
        self.out = Path(out)
        if (self.out / "index.json").exists():
            raise UserError(f"{out} holds a finished token store: choose another folder")
        for name, spec in arrays.items():
            check_array_name(name)
            ArraySpec.from_dict(name, spec.to_dict())
        check_lengths_arrays(arrays)
        self.out.mkdir(parents=True, exist_ok=True)
        self.arrays, self.shard_samples = with_token_scales(arrays), shard_samples
        if scales:
            save_scales(self.out, scales)
        self.scales = load_scales(self.out, self.arrays)
        self.reduced, self.split_rule, self.thumbnails = reduced, split_rule, thumbnails
        self._open: dict[str, ShardWriter] = {}
        self._done: dict[str, list[ShardEntry]] = {}

    def add(
        self,
        split: str,
        key: str,
        arrays: dict[str, np.ndarray],
        caption: str = "",
        source: str = "",
        thumbnail: bytes | None = None,
        **extra: Any,
    ) -> None:
        """Append one sample to a split; `extra` goes into KEY.json."""
        check_split(split)
        done = self._done.setdefault(split, [])
        if split not in self._open:
            name = f"{split}-{len(done):06d}"
            self._open[split] = ShardWriter(
                self.out, name, split, self.arrays, self.scales, self.thumbnails
            )
        shard = self._open[split]
        shard.add(key, arrays, {"caption": caption, "source": source, **extra}, thumbnail)
        if len(shard) == self.shard_samples:
            done.append(self._open.pop(split).close())

    def close(self) -> TokenIndex:
        for split in list(self._open):
            self._done[split].append(self._open.pop(split).close())
        shards = [entry for entries in self._done.values() for entry in entries]
        if not shards:
            raise UserError(f"{self.out}: no samples were added, so there is no store to write")
        index = TokenIndex(
            self.arrays, shards, self.reduced, self.split_rule, thumbnails=self.thumbnails
        )
        index.write(self.out)
        return index

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        for shard in self._open.values():
            shard.abort()
