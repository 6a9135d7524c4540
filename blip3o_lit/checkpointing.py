"""Checkpoint files: written whole or not at all, verified before they are trusted, found again.

torch.save writes a zip archive whose every record carries a CRC-32; reading all records back
is the verification, so no second file can get lost or disagree.
"""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

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
            temporary.replace(path)
            sync_folder(path.parent)
        except (OSError, RuntimeError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(
                f"{path}: the checkpoint could not be written ({error}): free disk space or choose "
                "another folder with hydra.run.dir"
            ) from error


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_sound(path: Path) -> bool:
    """Whether every record of a checkpoint file reads back with its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError):
        return False


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint of this project onto the CPU, tensors and plain data only.

    Raises:
        UserError: If the file is missing, damaged, of another program or of a newer format.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    if not is_sound(path):
        raise UserError(f"{path}: the checkpoint is damaged: use another one of its folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint that holds tensors and plain data only"
        ) from error
    facts = checkpoint.get("blip3o") if isinstance(checkpoint, dict) else None
    if facts is None:
        raise UserError(f"{path}: not a checkpoint of blip3o_lit")
    if facts["format"] > FORMAT:
        raise UserError(
            f"{path}: format {facts['format']} is newer than this version reads ({FORMAT}): "
            "update blip3o_lit"
        )
    return checkpoint


def step_of(path: Path) -> int:
    """Return the step in a file's name, or -1 for best and last."""
    match = _STEP_PATTERN.search(path.name)
    return int(match.group(1)) if match else -1


def newest_sound(run_dir: Path) -> tuple[Path | None, list[Path]]:
    """Return the newest sound checkpoint of a run directory, and the damaged ones passed over."""
    folder = run_dir / "checkpoints"
    files = [path for path in folder.glob("*.ckpt") if path.name != "best.ckpt"]
    damaged = []
    for path in sorted(files, key=lambda file: (file.stat().st_mtime, step_of(file)), reverse=True):
        if is_sound(path):
            return path, damaged
        damaged.append(path)
    return None, damaged
