"""Files behind an address, read once from front to back; broken connections are opened again."""

import time
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

import aiohttp
import fsspec

from blip3o_lit.base.objects import PAUSES, SCHEMES
from blip3o_lit.config.errors import UserError

T = TypeVar("T")


def open_remote(url: str) -> BinaryIO:
    """Open a file behind an address.

    A web server that does not announce ranges is read in one answer, however slowly; a `read` may
    then return less than was asked for. All others are read block by block.
    """
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "://" not in url or "::" in url:
        raise UserError(f"{url}: {scheme}: is not read; use one of {', '.join(SCHEMES)}")
    try:
        if not scheme.startswith("http"):
            return fsspec.open(url, "rb").open()  # type: ignore[union-attr, return-value]
        patience = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=300)
        system, path = fsspec.url_to_fs(url, client_kwargs={"timeout": patience})
        options = {} if system.info(path).get("partial") else {"block_size": 0}
        return system.open(path, "rb", **options)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error


def resumed(
    read: Callable[[int], Iterator[T]],
    url: str,
    start: int = 0,
    pauses: tuple[float, ...] = PAUSES,
) -> Iterator[T]:
    """Yield what `read(start)` yields; after a broken connection go on with `read(next item)`."""
    failures = 0
    while True:
        try:
            for item in read(start):
                start, failures = start + 1, 0
                yield item
            return
        except FileNotFoundError as error:
            raise UserError(f"{url} can't be read (it is not there): check the address") from error
        except (OSError, aiohttp.ClientError) as error:
            if failures == len(pauses):
                raise UserError(f"{url} can't be read ({error}): check the network") from error
            time.sleep(pauses[failures])
            failures += 1
