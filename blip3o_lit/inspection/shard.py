"""A tar of a token store held against the index: its size and its checksum."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

from blip3o_lit.tokens.index import ShardEntry


def shard_problem(folder: Path, entry: ShardEntry) -> str:
    """Compare a tar's size and checksum with the index; empty when both are right."""
    path = folder / entry.file
    try:
        facts = path.stat()
    except OSError as error:
        return f"{entry.file} ({entry.samples} samples) can't be read: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        return f"{entry.file} is no regular file"
    if facts.st_size != entry.bytes:
        return f"{entry.file} has {facts.st_size} bytes, index.json promises {entry.bytes}"
    if file_hash(path) != entry.sha256:
        return f"{entry.file} has another sha256 than index.json says: its content changed"
    return ""


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
