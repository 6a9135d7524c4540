"""One shard behind a URL, read from front to back.

Nothing is decoded by webdataset, whose default decoders unpickle: members are checked against the
index and read as plain numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from webdataset.tariterators import group_by_keys

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.remote import read_whole
from blip3o_lit.tokens import tar
from blip3o_lit.tokens.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.remote_store import open_url
from blip3o_lit.tokens.storage import finite


def shard_members(stream: BinaryIO, url: str, index: TokenIndex) -> Iterator[dict[str, Any]]:
    """Yield a tar's files as webdataset's `group_by_keys` takes them, each checked before reading.

    Raises:
        UserError: On anything that the index does not promise.
    """
    sizes = {f"{name}.npy": s.nbytes + tar.NPY_HEADER_LIMIT for name, s in index.arrays.items()}
    sizes["json"] = tar.JSON_LIMIT
    while True:
        block = read_whole(stream, tar.BLOCK)
        parsed = tar.parse_header(block, url) if block else None
        if parsed is None:
            if not block:
                raise UserError(f"{url}: the shard is cut off")
            break
        name, size = parsed
        limit = sizes.get(name.partition(".")[2], -1)
        if size > limit:
            reason = "is not in index.json" if limit < 0 else f"claims {size} bytes"
            raise UserError(f"{url}: member {name} {reason}: the store is damaged or hostile")
        # Padding apart: cutting it off would copy the member.
        content, padding = read_whole(stream, size), read_whole(stream, -size % tar.BLOCK)
        if len(content) != size or len(padding) != -size % tar.BLOCK:
            raise UserError(f"{url}: sample {name.partition('.')[0]} is cut off")
        yield {"fname": name, "data": content, "__url__": url}
    yield {}


def shard_samples(
    url: str, entry: ShardEntry, index: TokenIndex, arrays: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard: `__key__` and the stored numbers of `arrays`.

    Raises:
        UserError: If the shard is not what the index promises.
        OSError, aiohttp.ClientError: If the network fails.
    """
    count = 0
    try:
        with open_url(url) as stream:
            members = shard_members(stream, url, index)
            for sample in group_by_keys(members, lcase=False):
                out: dict[str, Any] = {"__key__": sample["__key__"]}
                for name in arrays:
                    where = f"{url}: {sample['__key__']}.{name}.npy"
                    spec, content = index.arrays[name], sample.get(f"{name}.npy", b"")
                    start = tar.npy_start(content, spec.stored, spec.shape, where)
                    if len(content) != start + spec.nbytes:
                        raise UserError(f"{where} has a wrong size: the store is damaged")
                    flat = np.frombuffer(content, spec.stored, offset=start)
                    if not finite(flat, spec.dtype):
                        raise UserError(f"{where} holds NaN or infinity: extract it again")
                    out[name] = flat.reshape(spec.shape)
                yield out
                count += 1
    except UserError:
        raise
    except (ValueError, AssertionError) as error:
        raise UserError(f"{url} is damaged ({error}): extract it again") from error
    if count != entry.samples:
        raise UserError(f"{url} holds {count} samples, index.json promises {entry.samples}")
