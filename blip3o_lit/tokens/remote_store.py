"""A token store behind a URL: its index, heads and validation shards, which are downloaded once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import fsspec

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.files import write_synced
from blip3o_lit.config.home import home
from blip3o_lit.config.remote import open_remote
from blip3o_lit.tokens.heads import Head
from blip3o_lit.tokens.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.reader import TokenStore
from blip3o_lit.tokens.storage import SCALES_FILE

SCHEMES = ("http", "https", "s3", "gs", "hf", "file")
COPY_BYTES = 1 << 24


def is_url(store: Path | str) -> bool:
    """Return whether a store is given as a URL; `pipe:` counts, to be refused."""
    return "://" in str(store) or str(store).startswith("pipe:")


def open_url(url: str) -> BinaryIO:
    """Open a file behind a URL.

    Raises:
        UserError: On a scheme that is not listed, a missing file, or a missing driver.
    """
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "://" not in url or "::" in url:
        raise UserError(f"{url}: {scheme}: is not read; use one of {', '.join(SCHEMES)}")
    try:
        return open_remote(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except OSError as error:
        raise UserError(f"{url} can't be opened ({error}): check the address") from error


class RemoteStore:
    """The index, heads and validation shards of a store behind a URL."""

    def __init__(self, url: str, verify: str = "size") -> None:
        """Read index.json.

        Raises:
            UserError: If there is none, or it is not one that this version reads.
        """
        self.url, self.verify = url.rstrip("/"), verify
        with open_url(f"{self.url}/index.json") as file:
            self.index = TokenIndex.parse(file.read(), f"{self.url}/index.json")
        self.cache = home() / "remote" / self.index.hash[:32]

    def fetch(self, name: str) -> Path:
        """Download a file of the store into the cache, unless it is there, and return its path."""
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / name
        if not path.is_file():
            with open_url(f"{self.url}/{name}") as source:
                write_synced(path, iter(lambda: source.read(COPY_BYTES), b""))
        return path

    def head(self, array: str) -> Head:
        """Return the norm and projection of an array's tower."""
        path = self.fetch("heads.safetensors")
        return Head.load(path, array, self.index.arrays[array].normed)

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
