"""Tars and npy headers of token shards: one output for one input, and every header checked.

A shard is an uncompressed ustar archive of regular files. No clock, user or mode goes in, so
rebuilds are byte-identical. Every header's checksum, name, type and size is checked before a byte
of its content is used.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from tokenize import TokenError
from typing import TypeVar

import numpy as np

from blip3o_lit.config.errors import UserError

BLOCK = 512
END = bytes(2 * BLOCK)
JSON_LIMIT = 1 << 20
"""Largest KEY.json, in bytes."""
NPY_HEADER_LIMIT = 4096
"""Largest npy header, in bytes."""
KEY_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@dataclass(frozen=True)
class Member:
    """One regular file inside a shard; its key and suffix are those of `<key>.<suffix>`."""

    name: str
    offset: int
    """First byte of its content."""
    size: int
    """Bytes of content."""

    @property
    def key(self) -> str:
        return self.name.partition(".")[0]

    @property
    def suffix(self) -> str:
        return self.name.partition(".")[2]


M = TypeVar("M", bound=Member)


def padding(size: int) -> bytes:
    """Return the zeros that fill `size` bytes up to a whole block."""
    return bytes(-size % BLOCK)


def header(name: str, size: int) -> bytes:
    """Return the ustar header of a regular file: mode 0644, owner 0, time 0.

    Raises:
        UserError: If the name does not fit.
    """
    if len(name) > 100:
        raise UserError(f"{name} is longer than 100 characters: shorten the name of its array")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def parse_header(block: bytes, where: str) -> Member | None:
    """Check one 512-byte header; None at the archive's end. The member's offset is left at 0.

    Raises:
        UserError: On a damaged header, a link, folder or device, or a foreign name.
    """
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
    member = Member(info.name, 0, info.size)
    if not KEY_CHARACTERS.issuperset(member.key) or not member.key:
        raise UserError(
            f"{where}: member {info.name!r} is no plain sample name; the shard is not ours"
        )
    array, _, extension = member.suffix.partition(".")
    if member.suffix != "json" and (not array or extension != "npy"):
        raise UserError(
            f"{where}: member {info.name!r} is refused, only npy and json files are read"
        )
    if info.size < 0 or (member.suffix == "json" and info.size > JSON_LIMIT):
        raise UserError(f"{where}: member {info.name} claims an absurd size")
    return member


def members(data: memoryview, where: str) -> Iterator[Member]:
    """Walk the headers of a whole tar, usually a memory map, and yield its members in order.

    Raises:
        UserError: On broken headers, links and devices, foreign names, or content beyond the end.
    """
    position = 0
    while position + BLOCK <= len(data):
        member = parse_header(bytes(data[position : position + BLOCK]), where)
        if member is None:
            return
        start, size = position + BLOCK, member.size
        if start + size > len(data):
            raise UserError(f"{where}: sample {member.key} is cut off or claims an absurd size")
        yield Member(member.name, start, size)
        position = start + size + (-size % BLOCK)
    if position > len(data):
        raise UserError(f"{where}: the shard is cut off")


def samples(files: Iterable[M], suffixes: Collection[str], where: str) -> Iterator[dict[str, M]]:
    """Group members into samples: one member per suffix, in any order.

    Raises:
        UserError: On a missing or repeated member, or one of another sample or suffix.
    """
    sample: dict[str, M] = {}
    key = ""
    for member in files:
        key = key if sample else member.key
        if member.key != key or member.suffix not in suffixes or member.suffix in sample:
            raise UserError(
                f"{where}: sample {key} is incomplete before member {member.name}: "
                "the shard is not the one that index.json describes"
            )
        sample[member.suffix] = member
        if len(sample) == len(suffixes):
            yield sample
            sample = {}
    if sample:
        raise UserError(f"{where}: sample {key} is incomplete at the end: extract it again")


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return numpy's own version 1.0 header for a C-order array (`dtype` as in `<f2`)."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


def read_npy_header(content: bytes, where: str) -> tuple[str, tuple[int, ...], int]:
    """Return the type (as in `<f2`), the shape and the start of the numbers of an npy file.

    Raises:
        UserError: If this is no npy file in C order.
    """
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


def npy_start(content: bytes, dtype: str, shape: tuple[int, ...], where: str) -> int:
    """Check an npy file's first bytes against the index and return where its numbers start.

    Raises:
        UserError: If this is no npy file, or one of another type, order or shape.
    """
    stored, stored_shape, start = read_npy_header(content, where)
    if stored != dtype or stored_shape != shape:
        raise UserError(
            f"{where} holds {stored} {list(stored_shape)}, index.json promises "
            f"{dtype} {list(shape)}: extract it again"
        )
    return start
