"""Numbers, lines and spans from a range of bytes that nobody vouches for."""

from __future__ import annotations

import struct
from typing import Any, BinaryIO

from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.arrays import Span


class ByteRange:
    """A range of bytes of a file, read from its start and never beyond its end."""

    def __init__(self, file: BinaryIO, start: int, end: int, where: str) -> None:
        """Read from byte `start`, never beyond `end`; `where` names the file in messages."""
        self.file, self.position, self.end, self.where = file, start, end, where
        file.seek(start)

    def fail(self, reason: str) -> UserError:
        """Return the error for the current position."""
        return UserError(f"{self.where}: {reason} (byte {self.position})")

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        self.need(count)
        data = self.file.read(count)
        self.position += count
        if len(data) != count:
            raise self.fail("the file became shorter while it was read")
        return data

    def need(self, count: int) -> None:
        """Refuse a length beyond the end, before anything of that size is allocated."""
        if count > self.end - self.position:
            raise self.fail(f"cut off: {count} more bytes are promised than the file has")

    def line(self, encoding: str = "utf-8") -> str:
        """Return a text argument of protocol 0."""
        data = self.file.readline(self.end - self.position)
        self.position += len(data)
        if not data.endswith(b"\n"):
            raise self.fail("cut off inside a line")
        return data[:-1].decode(encoding)

    def number(self, layout: str) -> Any:
        """Return a binary number."""
        return struct.unpack(layout, self.read(struct.calcsize(layout)))[0]

    def span(self, size: int) -> Span:
        """Skip `size` bytes and return where they lie."""
        self.need(size)
        span = Span(self.file, self.position, size, self.where)
        self.position += size
        self.file.seek(self.position)
        return span
