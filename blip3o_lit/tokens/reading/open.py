"""A token store by its path or address: local ones are read in place, others through a cache."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from blip3o_lit.base.files import one_at_a_time, room_on_disk, write_synced
from blip3o_lit.base.home import expanded, home
from blip3o_lit.base.objects import Objects, is_url
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.classes import CLASSES_FILE
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.heads import HEADS_FILE
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.store.int8 import SCALES_FILE
from blip3o_lit.tokens.store.shard_cache import ShardCache

WINDOWS = 2
"""Shuffle windows whose shards a cache must have room for: where reading is, and the next."""
SPARE = 2
LEAST_AHEAD = 12
"""Shards fetched ahead where the windows are smaller and the cache has room."""
BESIDE = (HEADS_FILE, SCALES_FILE, CLASSES_FILE)
"""Small files that a store may have; they are fetched when it is opened."""


def open_store(address: Path | str, data: DataConfig) -> TokenStore:
    """Open the store in a folder or behind an address."""
    if not is_url(address):
        return TokenStore.open(address, data.verify)
    objects = Objects(str(address))
    content = objects.whole("index.json")
    index = TokenIndex.parse(content, f"{objects.url}/index.json")
    cache = ShardCache(_cache_folder(data), objects)
    _set_limits(cache, index, data)
    folder = store_folder(address, data)
    with room_on_disk(f"data.cache={cache.folder}"), one_at_a_time(folder / "index.json"):
        _fetch_small_files(objects, folder, content)
    return TokenStore(folder, index, data.verify, cache)


def store_folder(address: Path | str, data: DataConfig) -> Path:
    """Return the folder of a store's small files: its own, or where they were put last."""
    if not is_url(address):
        return Path(address)
    name = hashlib.sha256(str(address).rstrip("/").encode()).hexdigest()[:32]
    return _cache_folder(data) / "stores" / name


def _cache_folder(data: DataConfig) -> Path:
    return expanded(data.cache) if data.cache else home() / "remote"


def _fetch_small_files(objects: Objects, folder: Path, index: bytes) -> None:
    """Fetch what is not there yet; of a store whose index is another now, everything."""
    known = folder / "index.json"
    same = known.is_file() and known.read_bytes() == index
    for name in BESIDE:
        if same and (folder / name).is_file():
            continue
        content = objects.whole_if_there(name)
        if content is None:
            (folder / name).unlink(missing_ok=True)
        else:
            write_synced(folder / name, content)
    if not same:
        write_synced(known, index)


def _set_limits(cache: ShardCache, index: TokenIndex, data: DataConfig) -> None:
    """Set what a cache may hold, by default half of what it could have, and fetch ahead."""
    if data.cache_gb is not None:
        cache.limit = int(data.cache_gb * 1e9)
    else:
        cache.limit = (cache.used() + shutil.disk_usage(cache.folder).free) // 2
    sizes = np.sort([shard.bytes for shard in index.shards])[::-1]
    read = WINDOWS * data.shuffle_window
    needed = int(sizes[: read + SPARE].sum())
    if cache.limit < needed:
        raise UserError(
            f"data.cache={cache.folder} may hold {cache.limit / 1e9:.3g} GB; "
            f"data.shuffle_window={data.shuffle_window} reads {min(read + SPARE, len(sizes))} "
            f"shards of {cache.objects.url} at a time: give data.cache_gb={needed / 1e9:.3g} or "
            "more, or lower data.shuffle_window"
        )
    room = int(cache.limit // sizes[0]) - SPARE
    cache.ahead = max(1, min(max(read, LEAST_AHEAD), room))
