"""Writes a store's index again, from the shards that are sound, and names what is lost."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load_file

from blip3o_lit.base.files import write_synced
from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.store import file_hash, shard_problem
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.index import STORED, ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.mapped_shard import map_tar, scan
from blip3o_lit.tokens.store.shards import pack_offsets
from blip3o_lit.tokens.store.storage import SCALES_FILE, scale_array, scale_hash
from blip3o_lit.tokens.views import GRID_64

SHARD = re.compile(r"([A-Za-z0-9_-]+)-(\d{6})\.tar")


@dataclass(frozen=True)
class Repaired:
    """What a repair kept and what it could not."""

    index: TokenIndex
    lost: list[str]
    """One line per shard that is not in the new index."""
    found: list[str]
    """Shards that the old index did not list."""


def repair(folder: Path) -> Repaired:
    """Write index.json and offset files from sound shards; the old index is kept beside it.

    A shard that the index lists is sound when its size, checksum and every header are right; one
    that it does not list, when every header is.

    Raises:
        UserError: If no shard is sound, or the folder can't be written.
    """
    try:
        data = _old_index(folder)
        arrays = _arrays(folder, data)
        listed = data.get("shards")
        entries = {
            entry.file: entry
            for entry in map(_entry, listed if isinstance(listed, list) else [])
            if entry is not None
        }
        names = sorted(set(entries) | {path.name for path in folder.glob("*.tar")})
        lost: list[str] = []
        sound: list[ShardEntry] = []
        with Work("checking", len(names), "shards") as work:
            for name in names:
                entry = entries.get(name)
                try:
                    sound.append(_sound(folder, name, entry, arrays))
                except UserError as error:
                    samples = f"{entry.samples} samples" if entry else "its samples"
                    lost.append(f"{name}: {samples} lost ({error})")
                work.advance(1)
        if not sound:
            raise UserError(f"{folder} has no sound shard: extract or convert again")
        if "reduced" in data:
            reduced = data["reduced"]
        else:
            grids = {spec.grid for spec in arrays.values() if spec.kind == "tokens"}
            reduced = "grid_64" if grids == {GRID_64} else None
        rejects = data.get("rejects", 0)
        rule = str(data.get("split_rule", ""))
        index = TokenIndex(arrays, sound, reduced, rule, rejects if type(rejects) is int else 0)
        old = folder / "index.json"
        if old.exists():
            write_synced(folder / "index.json.before-repair", old.read_bytes())
        index.write(folder)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}: mend it first") from error
    return Repaired(index, lost, [shard.file for shard in sound if shard.file not in entries])


def _sound(
    folder: Path, name: str, entry: ShardEntry | None, arrays: dict[str, ArraySpec]
) -> ShardEntry:
    """Check a shard, write its offsets, and return its entry."""
    problem = shard_problem(folder, entry) if entry else ""
    if problem:
        raise UserError(problem)
    parts = SHARD.fullmatch(name)
    if parts is None:
        raise UserError(f"{name} is no name of a shard (<split>-NNNNNN.tar)")
    path = folder / name
    offsets = scan(map_tar(path), arrays, name, entry.samples if entry else None)
    if entry is None:
        offsets_name = f"{name.removesuffix('.tar')}.idx"
        size = path.stat().st_size
        entry = ShardEntry(name, offsets_name, parts[1], len(offsets), size, file_hash(path))
    write_synced(folder / entry.offsets, pack_offsets(offsets, entry.sha256))
    return entry


def _old_index(folder: Path) -> dict[str, Any]:
    """Return what can be read of index.json; empty when nothing can."""
    if not folder.is_dir():
        raise UserError(f"tokens={folder} is no folder")
    try:
        data = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def _entry(data: Any) -> ShardEntry | None:
    """Return a shard's entry of the old index, or None when it makes no sense."""
    try:
        entry = ShardEntry(**data)
        whole = type(entry.samples) is int and type(entry.bytes) is int
        return entry if whole and SHARD.fullmatch(entry.file) and len(entry.sha256) > 1 else None
    except TypeError:
        return None


def _arrays(folder: Path, data: dict[str, Any]) -> dict[str, ArraySpec]:
    """Return the arrays of the old index, else what the first readable shard's headers show."""
    try:
        listed = {str(k): ArraySpec.from_dict(k, v) for k, v in data["arrays"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        listed = {}
    if listed:
        return listed
    for path in sorted(folder.glob("*.tar")):
        try:
            arrays = _first_sample(path)
        except UserError:
            continue
        if arrays:
            return _described(folder, _with_scales(folder, arrays))
    raise UserError(f"{folder} has no index.json and no readable shard: extract or convert again")


def _first_sample(path: Path) -> dict[str, ArraySpec]:
    """Return the arrays of a tar's first sample; grids are taken to be square, scales left open.

    Raises:
        UserError: If a header is broken, or an array is none that a store can hold.
    """
    types = {stored: name for name, stored in STORED.items()}
    arrays: dict[str, ArraySpec] = {}
    with memoryview(map_tar(path)) as view:
        for member in tar.members(view, path.name):
            if member.suffix == "json":
                return arrays
            name = member.suffix.removesuffix(".npy")
            start = bytes(view[member.offset : member.offset + tar.NPY_HEADER_LIMIT])
            dtype, shape, _ = tar.read_npy_header(start, f"{path.name}: {member.name}")
            stored = types.get(dtype, "")
            if len(shape) == 1:
                spec = ArraySpec("text", stored, shape)
            else:
                side = math.isqrt(shape[0]) if shape else 0
                cls = len(shape) > 0 and side * side == shape[0] - 1
                spec = ArraySpec("tokens", stored, shape, cls=cls, grid=(side, side))
            arrays[name] = spec if stored == "int8" else ArraySpec.from_dict(name, spec.to_dict())
    return {}


def _with_scales(folder: Path, arrays: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Give int8 arrays their scales: by token where such an array lies beside them.

    Raises:
        UserError: If scales.safetensors is lost: without it int8 says nothing.
    """
    try:
        scales = load_file(folder / SCALES_FILE)
    except (OSError, SafetensorError):
        scales = {}
    out = dict(arrays)
    for name, spec in arrays.items():
        if spec.dtype != "int8":
            continue
        if name not in scales:
            raise UserError(
                f"{folder / SCALES_FILE} is missing or damaged, and {name} is int8: restore it, or "
                "extract or convert again"
            )
        beside = arrays.get(scale_array(name))
        if beside is not None:
            out[scale_array(name)] = replace(beside, kind="scale")
        scale = "channel" if beside is None else "token"
        out[name] = replace(spec, scale=scale, scale_hash=scale_hash(scales[name]))
    return out


def _described(folder: Path, arrays: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Add tower, layer and preprocessing from extraction.json, where extract left one."""
    try:
        recipe = json.loads((folder / "extraction.json").read_bytes())
        entries = {**recipe["towers"], "text": recipe["captions"]}
        known = {name: ArraySpec.from_dict(name, entry) for name, entry in entries.items() if entry}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, UserError):
        return arrays
    out = dict(arrays)
    for name, spec in arrays.items():
        if name in known and known[name].shape == spec.shape:
            parts = ("dtype", "scale", "scale_hash", "cosine")
            out[name] = replace(known[name], **{part: getattr(spec, part) for part in parts})
    return out
