"""Writing files so that no reader, and no power cut, ever sees half of one."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip3o_lit.config.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk answers, or a spent quota."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` to write to; what was written there takes the place of `path`.

    Missing folders are made. A failed write leaves the old file as it was, and nothing else. The
    file's mode is what the umask and the folder make it, whatever a library gives its files.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_synced(path: Path, content: bytes | Iterable[bytes]) -> None:
    """Write a file that is complete and on disk when this returns, or is not there at all."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.writelines([content] if isinstance(content, bytes) else content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def write_json(path: Path, content: dict[str, Any] | list[Any]) -> None:
    """Write sorted, finite JSON."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def sha256_of(path: Path) -> str:
    """Return the checksum of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path, fix: str = "remove it") -> dict[str, Any]:
    """Return a JSON object, empty where there is no file; `fix` ends the error of a damaged one."""
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): {fix}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not an object: {fix}")
    return content


def check_format(path: Path, version: object, known: int) -> None:
    """Refuse a file of a format that this version does not know."""
    if isinstance(version, bool) or not isinstance(version, int):
        raise UserError(f"{path}: its format is {version!r}, not a number: it is damaged")
    if version > known:
        raise UserError(
            f"{path}: format {version} is newer than this version reads ({known}): "
            "update blip3o_lit"
        )


@contextmanager
def claimed(folder: Path, key: str) -> Iterator[None]:
    """Make a folder and hold it, so that no other process writes into it at the same time.

    The claim ends with the process, however it ends. Where a file system has no locks, nothing is
    claimed. `key` is the override that chooses the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{key}={folder}: {error.strerror}: choose another {key}") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{key}={folder}: another process writes into this folder: wait for its end or "
                f"choose another {key}"
            ) from None
        except OSError:
            pass  # a network file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def one_at_a_time(path: Path, required: bool = True) -> Iterator[None]:
    """Hold what `path` stands for, waiting while another process does; a killed one lets it go.

    On a network file system without locks that is an error, or where not `required` nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            if required:
                raise
        yield


def check_disk(out: Path, needed: float, what: str, fix: str, key: str = "out") -> None:
    """Stop before the disk is full; `what` takes `needed` bytes, `key` is the folder's override."""
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"{key}={out} has {free / 1e9:.2f} GB free, {what} {needed / 1e9:.2f} GB: {fix}"
        )


@contextmanager
def room_on_disk(place: str) -> Iterator[None]:
    """Say in one line that the disk of `place`, such as `out=DIR`, is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        line = f"{place}: the disk is full ({error.strerror}): free some, run it again"
        raise UserError(line) from error


def temporary_name(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process has, on this machine or another."""
    return path.with_name(f".{path.name}.{os.urandom(6).hex()}.tmp")


def sync_folder(folder: Path) -> None:
    """Bring a folder's own entries (new names) to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
