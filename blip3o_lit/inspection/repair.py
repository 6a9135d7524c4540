"""Writes a store's index again, from the shards that are sound, and names what is lost."""

import json
import math
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from blip3o_lit.base.files import write_synced
from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.store import shard_problem
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.checksums import checksums_of
from blip3o_lit.tokens.store.index import (
    STORED,
    ArraySpec,
    ShardEntry,
    TokenIndex,
    lengths_array,
    sequences_of,
)
from blip3o_lit.tokens.store.int8 import SCALES_FILE, scale_array, scale_hash
from blip3o_lit.tokens.store.mapped_shard import map_tar, scan
from blip3o_lit.tokens.store.shards import pack_offsets
from blip3o_lit.tokens.views import GRID_64

SHARD = re.compile(r"([A-Za-z0-9_-]+)-(\d{6,})\.tar")
STORAGES = {npy_type: name for name, npy_type in STORED.items()}


@dataclass(frozen=True)
class Repaired:
    """What a repair kept and what it could not."""

    index: TokenIndex
    lost: list[str]
    """One line per shard that is not in the new index."""
    unlisted: list[str]
    """Shards that the old index did not list."""


def repair(folder: Path) -> Repaired:
    """Write index.json and offset files from sound shards; the old index is kept beside it.

    A shard that the index lists is sound when its size, checksum and every header are right; one
    that it does not list, when every header is.
    """
    if not folder.is_dir():
        raise UserError(f"tokens={folder} is no folder")
    try:
        data = _old_index(folder)
        arrays, thumbnails = _arrays(data), data.get("thumbnails") is True
        if not arrays:
            arrays, thumbnails = _arrays_of_shards(folder)
        entries = _entries(data)
        sound, lost = _sort_out(folder, entries, arrays, thumbnails)
        if not sound:
            raise UserError(f"{folder} has no sound shard: extract or convert again")
        rejects = data.get("rejects")
        grids = {spec.grid for spec in arrays.values() if spec.kind == "tokens"}
        reduced = "grid_64" if grids == {GRID_64} else None
        index = TokenIndex(
            arrays,
            sound,
            data.get("reduced", reduced),
            str(data.get("split_rule", "")),
            rejects if type(rejects) is int else 0,
            thumbnails,
        )
        if (folder / "index.json").exists():
            old = (folder / "index.json").read_bytes()
            write_synced(folder / "index.json.before-repair", old)
        index.write(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}: mend it first") from error
    return Repaired(index, lost, [shard.file for shard in sound if shard.file not in entries])


def _old_index(folder: Path) -> dict[str, Any]:
    """Return what can be read of index.json; empty when nothing can."""
    try:
        data = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _arrays(data: dict[str, Any]) -> dict[str, ArraySpec]:
    try:
        return {name: ArraySpec.from_dict(name, entry) for name, entry in data["arrays"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _entries(data: dict[str, Any]) -> dict[str, ShardEntry]:
    """Return the entries of the old index that make sense, by file."""
    entries: dict[str, ShardEntry] = {}
    listed = data.get("shards")
    for item in listed if isinstance(listed, list) else []:
        try:
            entry = ShardEntry(**item)
            named = SHARD.fullmatch(entry.file) and len(entry.sha256) > 1
        except TypeError:
            continue
        if named and type(entry.samples) is int and type(entry.bytes) is int:
            entries[entry.file] = entry
    return entries


def _sort_out(
    folder: Path,
    entries: dict[str, ShardEntry],
    arrays: dict[str, ArraySpec],
    thumbnails: bool,
) -> tuple[list[ShardEntry], list[str]]:
    """Return the entries of sound shards, and a line per shard that is lost."""
    sound: list[ShardEntry] = []
    lost: list[str] = []
    names = sorted(set(entries) | {path.name for path in folder.glob("*.tar")})
    with Work("checking", len(names), "shards") as work:
        for name in names:
            entry = entries.get(name)
            try:
                sound.append(_sound(folder, name, entry, arrays, thumbnails))
            except UserError as error:
                samples = f"{entry.samples} samples" if entry else "its samples"
                lost.append(f"{name}: {samples} lost ({error})")
            work.advance(1)
    return sound, lost


def _sound(
    folder: Path,
    name: str,
    entry: ShardEntry | None,
    arrays: dict[str, ArraySpec],
    thumbnails: bool,
) -> ShardEntry:
    """Check a shard, write its offsets, and return its entry, which has a crc32 from now on."""
    problem, crc32 = shard_problem(folder, entry) if entry else ("", "")
    if problem:
        raise UserError(problem)
    parts = SHARD.fullmatch(name)
    if parts is None:
        raise UserError(f"{name} is no name of a shard (<split>-NNNNNN.tar)")
    path = folder / name
    promise = entry.samples if entry else None
    offsets = scan(map_tar(path), arrays, thumbnails, name, promise)
    if entry is None:
        idx_name, size = path.with_suffix(".idx").name, path.stat().st_size
        sums = checksums_of(path)
        crc32, facts = sums.crc32, (parts[1], len(offsets), size, sums.sha256)
        entry = ShardEntry(name, idx_name, *facts)
    write_synced(folder / entry.offsets, pack_offsets(offsets, entry.sha256))
    return replace(entry, crc32=crc32)


def _arrays_of_shards(folder: Path) -> tuple[dict[str, ArraySpec], bool]:
    """Return the arrays that the first readable shard's headers show, and whether it has JPEGs."""
    for path in sorted(folder.glob("*.tar")):
        try:
            arrays, thumbnails = _first_sample(path)
        except UserError:
            continue
        if arrays:
            arrays = _with_longest(folder, _with_scales(folder, arrays), thumbnails)
            return _described(folder, arrays), thumbnails
    raise UserError(f"{folder} has no index.json and no readable shard: extract or convert again")


def _first_sample(path: Path) -> tuple[dict[str, ArraySpec], bool]:
    """Return the arrays of a tar's first sample, and whether it has a thumbnail.

    Grids are taken to be square, scales left open.
    """
    headers: dict[str, tuple[str, tuple[int, ...]]] = {}
    thumbnail = False
    with memoryview(map_tar(path)) as view:
        for member in tar.members(view, path.name):
            if member.suffix == "json":
                return _specs(headers), thumbnail
            if member.suffix == "jpg":
                thumbnail = True
                continue
            name = member.suffix.removesuffix(".npy")
            start = bytes(view[member.offset : member.offset + tar.NPY_HEADER_LIMIT])
            dtype, shape, _ = tar.read_npy_header(start, f"{path.name}: {member.name}")
            headers[name] = STORAGES.get(dtype, ""), shape
    return {}, False


def _specs(headers: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, ArraySpec]:
    """Return arrays by their types and shapes; one that has lengths beside it is a sequence."""
    arrays: dict[str, ArraySpec] = {}
    for name, (dtype, shape) in headers.items():
        spec = ArraySpec("lengths" if dtype == "int32" else "text", dtype, shape)
        if lengths_array(name) in headers:
            spec = replace(spec, kind="sequence", shape=(1, *shape[1:]))  # its longest comes later
        elif len(shape) == 2:
            side = math.isqrt(shape[0])
            cls = side * side == shape[0] - 1
            spec = replace(spec, kind="tokens", cls=cls, grid=(side, side))
        if spec.dtype != "int8":
            ArraySpec.from_dict(name, spec.to_dict())
        arrays[name] = spec
    return arrays


def _with_longest(
    folder: Path, arrays: dict[str, ArraySpec], thumbnails: bool
) -> dict[str, ArraySpec]:
    """Give sequences the length of the longest caption in all readable shards."""
    names = sequences_of(arrays)
    longest = dict.fromkeys(names, 1)
    for path in sorted(folder.glob("*.tar")) if names else ():
        with suppress(UserError), memoryview(map_tar(path)) as view:
            for sample in tar.samples(tar.members(view, path.name), arrays, path.name, thumbnails):
                for name in names:
                    numbers = sample[lengths_array(name)]
                    found = np.frombuffer(view, "<i4", numbers.size // 4, numbers.offset)
                    longest[name] = max(longest[name], int(found.max()))
    return {
        name: replace(spec, shape=(longest[name], spec.shape[1])) if name in longest else spec
        for name, spec in arrays.items()
    }


def _with_scales(folder: Path, arrays: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Give int8 arrays their scales: by token where such an array lies beside them."""
    try:
        scales = load_file(folder / SCALES_FILE)
    except (OSError, SafetensorError):
        scales = {}
    complete = dict(arrays)
    for name, spec in arrays.items():
        if spec.dtype != "int8":
            continue
        if name not in scales:
            raise UserError(
                f"{folder / SCALES_FILE} is missing or damaged, and {name} is int8: restore it, or "
                "extract or convert again"
            )
        scale, by_token = "channel", scale_array(name)
        if by_token in arrays:
            complete[by_token] = replace(arrays[by_token], kind="scale")
            scale = "token"
        complete[name] = replace(spec, scale=scale, scale_hash=scale_hash(scales[name]))
    return complete


def _described(folder: Path, arrays: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Add tower, layer and preprocessing from extraction.json, where extract left one."""
    try:
        recipe = json.loads((folder / "extraction.json").read_bytes())
        entries = {**recipe["towers"], "text": recipe["captions"]}
        known = {name: ArraySpec.from_dict(name, entry) for name, entry in entries.items() if entry}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return arrays
    described = dict(arrays)
    for name, spec in arrays.items():
        sequence = spec.kind == "sequence"  # whose longest caption may be shorter than the tower's
        if name in known and known[name].shape[sequence:] == spec.shape[sequence:]:
            measured = {
                key: getattr(spec, key) for key in ("dtype", "scale", "scale_hash", "cosine")
            }
            described[name] = replace(known[name], **measured)
    return described
