"""The few parts of tar and npy that token shards need: fixed headers out, checked headers in.

A shard is an uncompressed ustar archive of regular files. Writing has one output for one input (no
clock, user or mode goes in), so rebuilds are byte-identical. Reading trusts nothing: every header's
checksum, name, type and size is checked before a byte of its content is used.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from tokenize import TokenError

import numpy as np

from blip3o_lit.config.errors import UserError

BLOCK = 512
END = bytes(2 * BLOCK)
JSON_LIMIT = 1 << 20
"""Largest KEY.json, in bytes; captions and sources are a few hundred."""
NPY_HEADER_LIMIT = 4096
"""Largest npy header, in bytes; numpy itself writes 128."""
EXTENSIONS = ("npy", "json")
KEY_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@dataclass(frozen=True)
class Member:
    """One regular file inside a shard."""

    name: str
    offset: int
    """First byte of its content."""
    size: int
    """Bytes of content."""

    @property
    def key(self) -> str:
        """The sample that it belongs to."""
        return self.name.partition(".")[0]

    @property
    def suffix(self) -> str:
        """What follows the key, for example `eva.npy`."""
        return self.name.partition(".")[2]


def padding(size: int) -> bytes:
    """Return the zeros that fill `size` bytes up to a whole block."""
    return bytes(-size % BLOCK)


def header(name: str, size: int) -> bytes:
    """Return the ustar header of a regular file: mode 0644, owner 0, time 0."""
    field = bytearray(BLOCK)
    field[0 : len(name)] = name.encode("ascii")
    field[100:108] = b"0000644\0"
    field[108:116] = b"0000000\0"
    field[116:124] = b"0000000\0"
    field[124:136] = b"%011o\0" % size
    field[136:148] = b"00000000000\0"
    field[148:156] = b" " * 8
    field[156:157] = b"0"
    field[257:265] = b"ustar\x0000"
    field[148:156] = b"%06o\0 " % sum(field)
    return bytes(field)


def npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return numpy's own version 1.0 header for a C-order array (`dtype` as in `<f2`)."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return out.getvalue()


def npy_start(content: bytes, dtype: str, shape: tuple[int, ...], where: str) -> int:
    """Check an npy header against what the index promises and return where the numbers start.

    Args:
        content: At least the header of the file.
        dtype: The promised type, for example `<f2`.
        shape: The promised shape.
        where: Shard and member, for the message.

    Raises:
        UserError: If this is no npy file, or one of another type, order or shape.
    """
    stream = io.BytesIO(content[:NPY_HEADER_LIMIT])
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy version {version}")
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        found_shape, fortran, found = read(stream, max_header_size=NPY_HEADER_LIMIT)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError, TokenError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where} is no plain npy file ({reason}): extract it again") from error
    if fortran or found.str != np.dtype(dtype).str or found_shape != shape:
        raise UserError(
            f"{where} holds {found.str} {list(found_shape)}, index.json promises "
            f"{np.dtype(dtype).str} {list(shape)}: extract it again"
        )
    return stream.tell()


def check_name(name: str, where: str) -> None:
    """Refuse member names that are no KEY.<array>.npy or KEY.json.

    Raises:
        UserError: On paths, hidden files, and every extension but npy and json.
    """
    key, _, suffix = name.partition(".")
    if not key or not KEY_CHARACTERS.issuperset(key):
        raise UserError(f"{where}: member {name!r} is no plain sample name; the shard is not ours")
    if suffix != "json" and (suffix.count(".") != 1 or suffix.rpartition(".")[2] != "npy"):
        raise UserError(
            f"{where}: member {name!r} is refused, only {' and '.join(EXTENSIONS)} files are read"
        )


def _number(field: bytes) -> int:
    """Parse an octal header field; negative when it is not one."""
    text = field.strip(b" \0")
    return int(text, 8) if text and all(48 <= c <= 55 for c in text) else -1


def parse_header(block: bytes, where: str) -> tuple[str, int] | None:
    """Check one 512-byte header and return the file's name and size; None at the archive's end.

    Raises:
        UserError: On a damaged header, a link, folder or device, or a foreign name.
    """
    if not any(block):
        return None
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if len(block) != BLOCK or _number(block[148:156]) != total:
        raise UserError(f"{where}: broken tar header: the shard is damaged, restore it")
    name = block[0:100].rstrip(b"\0").decode("ascii", errors="backslashreplace")
    if block[156:157] not in (b"0", b"\0") or block[345:500].strip(b"\0"):
        raise UserError(
            f"{where}: member {name!r} is a link, folder, device or long path; "
            "a shard holds plain files alone"
        )
    check_name(name, where)
    size = _number(block[124:136])
    if size < 0 or (name.endswith(".json") and size > JSON_LIMIT):
        raise UserError(f"{where}: member {name} claims an absurd size")
    return name, size


def members(data: memoryview, where: str) -> Iterator[Member]:
    """Walk the headers of a tar, checking each.

    Args:
        data: The whole file, usually a memory map.
        where: The shard's name, for messages.

    Yields:
        The members in file order.

    Raises:
        UserError: On broken headers, links and devices, foreign names, or content beyond the end.
    """
    position = 0
    while position + BLOCK <= len(data):
        parsed = parse_header(bytes(data[position : position + BLOCK]), where)
        if parsed is None:
            return
        name, size = parsed
        start = position + BLOCK
        if start + size > len(data):
            raise UserError(
                f"{where}: sample {name.partition('.')[0]} is cut off or claims an absurd size"
            )
        yield Member(name, start, size)
        position = start + size + (-size % BLOCK)
    if position > len(data):
        raise UserError(f"{where}: the shard is cut off")
