"""The two checksums of a shard: sha256, which names its content, and crc32, which is checked fast.

A changed byte on the way from a bucket changes both; against a shard that somebody forged only the
sha256 helps, which doctor and data.verify=full check.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path
from typing import Any

BLOCK = 1 << 20


class Checksums:
    """Both checksums of bytes that come one part after the other, as digits base 16."""

    def __init__(self) -> None:
        self._sha256, self._crc32 = hashlib.sha256(), 0

    def update(self, part: bytes | memoryview) -> None:
        self._sha256.update(part)
        self._crc32 = zlib.crc32(part, self._crc32)

    @property
    def sha256(self) -> str:
        return self._sha256.hexdigest()

    @property
    def crc32(self) -> str:
        return f"{self._crc32:08x}"


def checksums_of(path: Path) -> Checksums:
    """Return the checksums of a file's content."""
    sums = Checksums()
    block = memoryview(bytearray(BLOCK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            sums.update(block[:size])
    return sums


def mismatch(content: Any, sha256: str, crc32: str) -> str:
    """Name the checksum that content in memory has not; empty where it has it.

    It is the crc32 where one is known, else the sha256.
    """
    if crc32:
        return "" if f"{zlib.crc32(content):08x}" == crc32 else "crc32"
    return "" if hashlib.sha256(content).hexdigest() == sha256 else "sha256"
