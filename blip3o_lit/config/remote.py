"""Files behind an address, read once from front to back."""

from __future__ import annotations

from typing import BinaryIO

import aiohttp
import fsspec


def open_remote(url: str) -> BinaryIO:
    """Open a file behind an address.

    A web server that does not announce ranges is read in one answer, however slowly; a `read` may
    then return less than was asked for. All others are read block by block.

    Raises:
        OSError, ImportError: What fsspec raises for a missing file or driver.
    """
    if not url.startswith(("http://", "https://")):
        return fsspec.open(url, "rb").open()  # type: ignore[union-attr, return-value]
    patience = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
    system, path = fsspec.url_to_fs(url, client_kwargs={"timeout": patience})
    options = {} if system.info(path).get("partial") else {"block_size": 0}
    return system.open(path, "rb", **options)


def read_whole(file: BinaryIO, size: int) -> bytes:
    """Read `size` bytes, or up to the end of the file."""
    parts, left = [], size
    while left and (part := file.read(left)):
        parts.append(part)
        left -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
