"""Checkpoint files: written whole or not at all, verified before they are trusted, found again.

torch.save writes a zip archive whose every record carries a CRC-32; reading all records back
is the verification, so no second file can get lost or disagree. A sharded checkpoint is a folder of
the same name; `sharded_checkpoint.py` knows what is in it.
"""

from __future__ import annotations

import errno
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from blip3o_lit.base.files import check_format
from blip3o_lit.checkpoints import sharded as sharded_checkpoint
from blip3o_lit.checkpoints.in_place import put_in_place
from blip3o_lit.config.errors import UserError

FORMAT = 1
STEP_FILE = "step-{step:08d}.ckpt"
_STEP_PATTERN = re.compile(r"step-(\d{8})\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, syncs and renames, so a killed run leaves no half file."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Save one checkpoint.

        Raises:
            UserError: When the disk is full or the folder cannot be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            put_in_place(temporary, path)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{path}: the checkpoint could not be written ({error}): free disk space or choose "
                "another folder with hydra.run.dir"
            ) from error

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load a checkpoint of either kind, whole, onto the CPU."""
        return _whole(Path(path))


def is_sound(path: Path) -> bool:
    """Whether all of a checkpoint, file or folder, reads back with its checksums.

    Raises:
        UserError: If it can't be read (no permission, a failing disk): that is not damage.
    """
    try:
        if not path.is_dir():
            return _archive_is_sound(path)
        plain = path / sharded_checkpoint.PLAIN
        if not _archive_is_sound(plain):
            return False
        return sharded_checkpoint.files_are_sound(path, facts(path)["files"])
    except OSError as error:
        raise _unreadable(path, error) from error


def _archive_is_sound(file: Path) -> bool:
    try:
        with file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            return archive.testzip() is None
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # a place that only a damaged archive names
            return False
        raise
    except Exception:  # zipfile raises a dozen classes on a damaged archive
        return False


def _unreadable(path: Path, error: OSError) -> UserError:
    reason = f"{path}: the checkpoint can't be read ({error.strerror})"
    return UserError(f"{reason}: mend that, or use another one of its folder")


def load(path: Path, weights_only: bool = False) -> dict[str, Any]:
    """Load a checkpoint of this project onto the CPU, tensors and plain data only.

    Args:
        path: A file, or the folder of a sharded one.
        weights_only: Leave a folder's optimizer state unread.

    Raises:
        UserError: If it is missing, damaged, of another program or of a newer format.
    """
    if not (path.is_file() or (path / sharded_checkpoint.PLAIN).is_file()):
        raise UserError(f"{path}: no such checkpoint")
    if not is_sound(path):
        raise UserError(f"{path}: the checkpoint is damaged: use another one of its folder")
    return _whole(path, "state_dict/" if weights_only else "")


def facts(path: Path, lazily: bool = True) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Args:
        path: A file or a folder.
        lazily: A file's tensors stay on the disk until touched: not for tensors that outlive it.

    Raises:
        UserError: If it can't be read, is of another program or of a newer format.
    """
    file = path / sharded_checkpoint.PLAIN if path.is_dir() else path
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=lazily)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint that holds tensors and plain data only"
        ) from error
    about = checkpoint.get("blip3o") if isinstance(checkpoint, dict) else None
    if not isinstance(about, dict) or not {"format", "config", "shape", "tokens"} <= set(about):
        raise UserError(f"{path}: not a checkpoint of blip3o_lit")
    check_format(path, about["format"], FORMAT)
    if not all(isinstance(about[part], dict) for part in ("config", "shape", "tokens")):
        raise UserError(f"{path}: the checkpoint is damaged: use another one of its folder")
    return checkpoint


def _whole(path: Path, prefix: str = "") -> dict[str, Any]:
    """Return a checkpoint of either kind with its tensors."""
    checkpoint = facts(path, lazily=False)
    return sharded_checkpoint.read(path, checkpoint, prefix) if path.is_dir() else checkpoint


def step_of(path: Path) -> int:
    """Return the step in a file's name, or -1 for best and last."""
    match = _STEP_PATTERN.search(path.name)
    return int(match.group(1)) if match else -1


def files_of(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run directory, none where it has none.

    Raises:
        UserError: If their folder can't be read.
    """
    folder = run_dir / "checkpoints"
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".ckpt")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: mend that, or choose another hydra.run.dir"
        ) from error


def newest_sound(run_dir: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest sound checkpoint of a run directory, and the damaged ones passed over.

    Raises:
        UserError: If one of them can't be read, so that nobody knows whether it is sound.
    """
    files = [path for path in files_of(run_dir) if path.name != "best.ckpt"]
    damaged = []
    for path in sorted(files, key=lambda file: (file.stat().st_mtime, step_of(file)), reverse=True):
        if is_sound(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def best_of(run_dir: Path) -> Path | None:
    """Return the checkpoint of a run directory to look at: the best, else the newest, if any."""
    files = {path.name: path for path in files_of(run_dir)}
    return files.get("best.ckpt") or files.get("last.ckpt") or next(reversed(files.values()), None)
