"""Checkpoint files: written whole or not at all, verified before they are trusted, found again.

torch.save writes a zip archive whose every record carries a CRC-32; reading all records back is
the verification. A sharded checkpoint is a folder of the same name; see `sharded.py`.
"""

import errno
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from blip3o_lit.base.files import check_format
from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.checkpoints import sharded as sharded_checkpoint
from blip3o_lit.checkpoints.background import Background
from blip3o_lit.checkpoints.in_place import (
    TEMPORARY,
    not_written,
    put_in_place,
    remove,
    save_synced,
)
from blip3o_lit.config.errors import UserError

FORMAT = 1
_STEP_PATTERN = re.compile(r"step-(\d{8})\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name, syncs and renames, so a killed run leaves no half file."""

    def __init__(self, saves: Background | None = None) -> None:
        super().__init__()
        self.saves = saves or Background()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        content = self.saves.snapshot(checkpoint)
        self.saves.do(partial(write, content, Path(path)))

    def load_checkpoint(
        self, path: Any, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return _whole(Path(path))


def write(checkpoint: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(TEMPORARY.format(path.name))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)
        save_synced(checkpoint, temporary)
        put_in_place(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise not_written(path, error) from error


def is_sound(path: Path, rank: int = 0, world: int = 1) -> bool:
    """Whether all of a checkpoint, file or folder, reads back with its checksums.

    Of several ranks each reads its share of a folder's files, the first one a file. One that can't
    be read (no permission, a failing disk) is a UserError: that is not damage.
    """
    try:
        if not path.is_dir():
            return rank > 0 or _archive_is_sound(path)
        if not _archive_is_sound(path / sharded_checkpoint.PLAIN):
            return False
        files = read_lazily(path)["files"]
        own = sorted(files)[rank::world]
        return all(sharded_checkpoint.measure(path / name) == files[name] for name in own)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _unreadable(path, error) from error


def check_sound(path: Path, ranks: FirstRank = ALONE) -> None:
    def holds() -> bool:
        if not path.exists():
            raise UserError(f"{path}: no such checkpoint")
        return is_sound(path, *ranks.share)

    if not ranks.agree(holds):
        raise damaged(path)


def _archive_is_sound(file: Path) -> bool:
    try:
        with file.open("rb") as opened, zipfile.ZipFile(opened) as archive:
            return archive.testzip() is None
    except OSError as error:
        # A damaged table of contents names offsets at which no file can be read: seeking to one is
        # EINVAL. zipfile's own complaints are OSErrors without a number.
        if error.errno in (None, errno.EINVAL):
            return False
        raise
    except Exception:  # zipfile raises a dozen classes on a damaged archive
        return False


def damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: the checkpoint is damaged: use another checkpoint from the same folder"
    )


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path}: the checkpoint can't be read ({error.strerror}): mend that, or use another "
        "checkpoint from the same folder"
    )


def load(path: Path, without_optimizer: bool = False) -> dict[str, Any]:
    """Load a checkpoint onto the CPU; `without_optimizer` leaves that state of a folder unread."""
    check_sound(path)
    return _whole(path, "state_dict/" if without_optimizer else "")


def about(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself: format, version, config, shape, tokens, step."""
    return read_lazily(path)["blip3o"]


def read_lazily(path: Path) -> dict[str, Any]:
    """Return a checkpoint's content without its bulk.

    Of a folder that is `plain.ckpt`, which has no tensors. A file's tensors are mapped, and read
    from the disk when they are touched: copy those that are needed once the file may change.
    """
    return _read(path, mapped=True)


def _read(path: Path, mapped: bool) -> dict[str, Any]:
    file = path / sharded_checkpoint.PLAIN if path.is_dir() else path
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:
        raise UserError(
            f"{path}: not a checkpoint that holds tensors and plain data only"
        ) from error
    own = checkpoint.get("blip3o") if isinstance(checkpoint, dict) else None
    if not isinstance(own, dict) or not {"format", "config", "shape", "tokens"} <= set(own):
        raise UserError(f"{path}: not a checkpoint of blip3o_lit")
    check_format(path, own["format"], FORMAT)
    if not all(isinstance(own[part], dict) for part in ("config", "shape", "tokens")):
        raise damaged(path)
    return checkpoint


def _whole(path: Path, prefix: str = "") -> dict[str, Any]:
    checkpoint = _read(path, mapped=False)
    return sharded_checkpoint.read(path, checkpoint, prefix) if path.is_dir() else checkpoint


def step_of(path: Path) -> int:
    """Return the step in a file's name, or -1 for best and last."""
    match = _STEP_PATTERN.search(path.name)
    return int(match.group(1)) if match else -1


def files_of(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run directory, none where it has none."""
    folder = run_dir / "checkpoints"
    try:
        return sorted(path for path in folder.iterdir() if path.suffix == ".ckpt")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}: mend that, or choose another hydra.run.dir"
        ) from error


def newest_to_resume(run_dir: Path, ranks: FirstRank = ALONE) -> tuple[Path | None, list[Path]]:
    """Return a run's newest sound checkpoint, and the damaged ones passed over.

    Never best.ckpt: a run goes on from where it was, not from where it was best.
    """

    def newest_first() -> list[str]:
        files = [path for path in files_of(run_dir) if path.name != "best.ckpt"]
        files.sort(key=lambda file: (file.stat().st_mtime, step_of(file)), reverse=True)
        return [str(path) for path in files]

    passed_over = []
    for path in map(Path, ranks.finds(newest_first)):
        if ranks.agree(lambda path=path: is_sound(path, *ranks.share)):
            return path, passed_over
        passed_over.append(path)
    return None, passed_over


def best_of(run_dir: Path) -> Path | None:
    """Return the checkpoint of a run directory to look at: the best, else the newest, if any."""
    files = {path.name: path for path in files_of(run_dir)}
    return files.get("best.ckpt") or files.get("last.ckpt") or next(reversed(files.values()), None)
