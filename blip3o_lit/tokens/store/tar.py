"""Tars and npy headers of token shards: plain ustar files, each checked before its content.

No clock, user or mode goes in, so rebuilds are byte-identical.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from tokenize import TokenError

import numpy as np

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import KEY_CHARACTERS, ArraySpec

BLOCK = 512
END = bytes(2 * BLOCK)
JSON_LIMIT = 1 << 20
"""Largest KEY.json or KEY.jpg, in bytes."""
BESIDE = ("jpg", "json")
"""Suffixes of a sample's files that are no arrays."""
NPY_HEADER_LIMIT = 4096
"""Largest npy header, in bytes."""


@dataclass(frozen=True)
class Member:
    """One file `<key>.<suffix>` of a shard."""

    name: str
    offset: int
    """First byte of its content, or of its numbers."""
    size: int
    """Bytes from there on."""
    content: bytes
    """Its bytes, those of a npy header at least."""

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]

    @property
    def suffix(self) -> str:
        return self.name.partition(".")[2]


def padding(size: int) -> bytes:
    """Return the zeros that fill `size` bytes up to a whole block."""
    return bytes(-size % BLOCK)


def header(name: str, size: int) -> bytes:
    if len(name) > 100:
        raise UserError(f"{name} is longer than 100 characters: shorten the name of its array")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def parse_header(block: bytes, where: str) -> Member | None:
    """Check one header; None at the archive's end. The member is still without content."""
    try:
        info = tarfile.TarInfo.frombuf(block, "ascii", "backslashreplace")
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
        return None
    except tarfile.HeaderError as error:
        raise UserError(f"{where}: broken tar header: the shard is damaged, restore it") from error
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise UserError(
            f"{where}: member {info.name!r} is a link, folder, device or long path; "
            "a shard holds plain files alone"
        )
    member = Member(info.name, 0, info.size, b"")
    if not KEY_CHARACTERS.issuperset(member.key) or not member.key:
        raise UserError(
            f"{where}: member {info.name!r} is no plain sample name; the shard is not ours"
        )
    array, _, extension = member.suffix.partition(".")
    if member.suffix not in BESIDE and (not array or extension != "npy"):
        raise UserError(
            f"{where}: member {info.name!r} is refused, only npy, json and jpg files are read"
        )
    if info.size < 0 or (member.suffix in BESIDE and info.size > JSON_LIMIT):
        raise UserError(f"{where}: member {info.name} claims an absurd size")
    return member


def members(data: memoryview, where: str) -> Iterator[Member]:
    """Yield the members of a whole tar, usually a memory map, in order."""
    position = 0
    while position + BLOCK <= len(data):
        member = parse_header(bytes(data[position : position + BLOCK]), where)
        if member is None:
            return
        start, size = position + BLOCK, member.size
        if start + size > len(data):
            raise UserError(f"{where}: sample {member.key} is cut off or claims an absurd size")
        yield replace(member, offset=start, content=bytes(data[start : start + NPY_HEADER_LIMIT]))
        position = start + size + (-size % BLOCK)
    if position > len(data):
        raise UserError(f"{where}: the shard is cut off")


def samples(
    files: Iterable[Member], arrays: dict[str, ArraySpec], where: str, thumbnails: bool = False
) -> Iterator[dict[str, Member]]:
    """Group members, in any order, into samples of one checked member per array, and `json`.

    With `thumbnails` each has a `jpg` too.
    """
    suffixes = {f"{name}.npy": name for name in arrays} | {"json": "json"}
    if thumbnails:
        suffixes["jpg"] = "jpg"
    sample: dict[str, Member] = {}
    key = ""
    for member in files:
        key = key if sample else member.key
        name = suffixes.get(member.suffix)
        if member.key != key or name is None or name in sample:
            raise UserError(
                f"{where}: sample {key} is incomplete before member {member.name}: "
                "the shard is not the one that index.json describes"
            )
        start = 0 if name in BESIDE else _npy_start(member, arrays[name], where)
        sample[name] = replace(member, offset=member.offset + start, size=member.size - start)
        if len(sample) == len(suffixes):
            yield sample
            sample = {}
    if sample:
        raise UserError(f"{where}: sample {key} is incomplete at the end: extract it again")


def _npy_start(member: Member, spec: ArraySpec, where: str) -> int:
    """Check a npy file against the index; return where its numbers start in it."""
    where = f"{where}: {member.name}"
    stored, shape, start = read_npy_header(member.content, where)
    sequence = spec.kind == "sequence"
    fits = len(shape) == 2 and shape[1] == spec.shape[1] if sequence else shape == spec.shape
    if stored != spec.stored or not fits:
        promise = ["any", spec.shape[1]] if sequence else [*spec.shape]
        raise UserError(
            f"{where} holds {stored} {list(shape)}, index.json promises "
            f"{spec.stored} {promise}: extract it again"
        )
    if member.size != start + (shape[0] * spec.row_bytes if sequence else spec.nbytes):
        raise UserError(f"{where} has a wrong size: extract it again")
    return start


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the version 1.0 header of a C-order array; `dtype` as in `<f2`."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


def read_npy_header(content: bytes, where: str) -> tuple[str, tuple[int, ...], int]:
    """Return the type (as in `<f2`), the shape and the start of the numbers of an npy file."""
    stream = io.BytesIO(content[:NPY_HEADER_LIMIT])
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            read = np.lib.format.read_array_header_1_0
        elif version == (2, 0):
            read = np.lib.format.read_array_header_2_0
        else:
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = read(stream, max_header_size=NPY_HEADER_LIMIT)
        if fortran:
            raise ValueError("Fortran order")
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} is no plain npy file ({reason}): extract it again") from error
    return dtype.str, shape, stream.tell()
