"""A token store behind a URL: small files and validation shards are downloaded once, others read.

A shard is read from front to back; its members are checked against the index and read as plain
numbers, never decoded by file type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np

from blip3o_lit.base.files import write_synced
from blip3o_lit.base.home import home
from blip3o_lit.base.remote import open_remote, read_whole
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.reading.reader import TokenStore
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.heads import HEADS_FILE, Head
from blip3o_lit.tokens.store.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.store.int8 import SCALES_FILE
from blip3o_lit.tokens.store.storage import finite

COPY_BYTES = 1 << 24


def is_url(store: Path | str) -> bool:
    """Return whether a store is given as a URL; `pipe:` counts, to be refused."""
    return "://" in str(store) or str(store).startswith("pipe:")


def open_url(url: str) -> BinaryIO:
    try:
        return open_remote(url)
    except OSError as error:
        raise UserError(f"{url} can't be opened ({error}): check the address") from error


class RemoteStore:
    """The index of a store behind a URL, and what of it lies in the cache."""

    def __init__(self, url: str, verify: str = "size") -> None:
        self.url, self.verify = url.rstrip("/"), verify
        with open_url(f"{self.url}/index.json") as file:
            self.index = TokenIndex.parse(file.read(), f"{self.url}/index.json")
        self.cache = home() / "remote" / self.index.hash[:32]

    def fetch(self, name: str) -> Path:
        """Download a file of the store into the cache, unless it is there, and return its path."""
        path = self.cache / name
        if not path.is_file():
            with open_url(f"{self.url}/{name}") as source:
                write_synced(path, iter(lambda: source.read(COPY_BYTES), b""))
        return path

    def head(self, array: str) -> Head:
        return Head.load(self.fetch(HEADS_FILE), array, self.index.arrays[array].normed)

    def offers(self, name: str) -> bool:
        """Return whether the store has a file of that name."""
        system, path = fsspec.url_to_fs(f"{self.url}/{name}")
        return bool(system.exists(path))

    def local_split(self, split: str, limit: int | None) -> TokenStore:
        """Download the shards that hold the first `limit` samples of a split."""
        if any(spec.dtype == "int8" for spec in self.index.arrays.values()):
            self.fetch(SCALES_FILE)
        shards: list[ShardEntry] = []
        count = 0
        for entry in self.index.shards:
            if entry.split == split and (limit is None or count < limit):
                shards.append(entry)
                count += entry.samples
                self.fetch(entry.file)
        return TokenStore(self.cache, replace(self.index, shards=shards), self.verify)

    def samples(
        self, entry: ShardEntry, arrays: tuple[str, ...]
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yield the stored numbers of `arrays`, sample by sample, from one shard.

        What fsspec and aiohttp raise when the network fails is passed on: see `resumed`.
        """
        url, count = f"{self.url}/{entry.file}", 0
        with open_remote(url) as stream:
            files = _members(stream, url, self.index)
            specs, thumbnails = self.index.arrays, self.index.thumbnails
            for sample in tar.samples(files, specs, url, thumbnails):
                numbers = {}
                for name in arrays:
                    file, spec = sample[name], specs[name]
                    flat = np.frombuffer(file.content, spec.stored, offset=file.offset)
                    if not finite(flat, spec.dtype):
                        raise UserError(
                            f"{url}: {file.name} holds NaN or infinity: extract it again"
                        )
                    numbers[name] = flat.reshape(spec.shape)
                yield numbers
                count += 1
        if count != entry.samples:
            raise UserError(f"{url} holds {count} samples, index.json promises {entry.samples}")


def _members(stream: BinaryIO, url: str, index: TokenIndex) -> Iterator[tar.Member]:
    """Read a tar's files, each checked before its content is read."""
    limits = {f"{name}.npy": s.nbytes + tar.NPY_HEADER_LIMIT for name, s in index.arrays.items()}
    limits["json"] = tar.JSON_LIMIT
    if index.thumbnails:
        limits["jpg"] = tar.JSON_LIMIT
    while block := read_whole(stream, tar.BLOCK):
        member = tar.parse_header(block, url)
        if member is None:
            return
        limit = limits.get(member.suffix)
        if limit is None or member.size > limit:
            reason = "is not in index.json" if limit is None else f"claims {member.size} bytes"
            where = f"{url}: member {member.name}"
            raise UserError(f"{where} {reason}: the store is damaged or hostile")
        # Padding is read apart: cutting it off would copy the member.
        content, rest = read_whole(stream, member.size), -member.size % tar.BLOCK
        if len(content) != member.size or len(read_whole(stream, rest)) != rest:
            raise UserError(f"{url}: sample {member.key} is cut off")
        yield replace(member, content=content)
    raise UserError(f"{url}: the shard is cut off")
