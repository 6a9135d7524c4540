"""Checkpoints as files or folders: put in place, named twice, removed, without half states.

A sharded checkpoint is a folder. Two folders can't be exchanged in one move, so the old one steps
aside under a hidden name first; `tidy` brings it back if the process was killed just then.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from blip3o_lit.base.files import sync_folder
from blip3o_lit.config.errors import UserError

ASIDE = ".{}.old"
TEMPORARY = ".{}.tmp"


def save_synced(content: dict[str, Any], path: Path) -> None:
    """Save a file with torch that is on the disk when this returns."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def not_written(path: Path, error: BaseException) -> UserError:
    reason = str(error).strip().splitlines()[-1]
    return UserError(
        f"{path}: the checkpoint could not be written ({reason}): free disk space or choose "
        "another folder with hydra.run.dir"
    )


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder, replacing what had the name."""
    aside = path.with_name(ASIDE.format(path.name))
    if path.is_dir() or (temporary.is_dir() and path.exists()):
        remove(aside)
        path.rename(aside)
    temporary.replace(path)
    remove(aside)
    sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there; a folder loses its name first."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if not path.name.startswith("."):
        hidden = path.with_name(TEMPORARY.format(path.name))
        shutil.rmtree(hidden, ignore_errors=True)
        path = path.rename(hidden)
    shutil.rmtree(path)


def second_name(path: Path, name: Path) -> None:
    """Give a file, or every file of a folder, a second name; whatever had it is replaced."""
    temporary = name.with_name(TEMPORARY.format(name.name))
    remove(temporary)
    if path.is_dir():
        shutil.copytree(path, temporary, copy_function=_link)
    else:
        _link(str(path), str(temporary))
    put_in_place(temporary, name)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # Some network file systems have no hard links.
        shutil.copyfile(source, target)


def tidy(folder: Path) -> None:
    """Bring back what stood aside when a process was killed, and remove unfinished writes."""
    for left in folder.glob(ASIDE.format("*")):
        name = folder / left.name.removeprefix(".").removesuffix(".old")
        if name.exists():
            remove(left)
        else:
            left.rename(name)
    for left in folder.glob(TEMPORARY.format("*")):
        remove(left)
