"""Averages of two or more widths, stored while a run trains: `averages/step-*.safetensors`.

A file holds each parameter of each average in fp16, and names widths and step in its metadata. A
run's checkpoints hold the same averages in fp32, so that a resumed run goes on with the very bits.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blip3o_lit.base.files import check_format, replacing, sync_folder
from blip3o_lit.checkpoints.in_place import not_written, second_name, tidy
from blip3o_lit.config.errors import UserError

FOLDER = "averages"
FORMAT = 1
NAME = "step-{:08d}.safetensors"
_PATTERN = re.compile(r"step-(\d{8})\.safetensors")
STORED = torch.float16
"""Its 11 bits are plenty: the coefficients of a fit add up to a few."""


@dataclass(frozen=True)
class Snapshot:
    """A stored file: which averages it holds, and of which step."""

    file: Path
    step: int
    widths: list[float]


def write_snapshot(
    averages: list[dict[str, Tensor]], widths: list[float], step: int, folder: Path
) -> None:
    """Write averages by parameter name, one for each width; the file is there whole or not."""
    path = folder / NAME.format(step)
    tensors = {
        f"{number}.{name}": tensor
        for number, average in enumerate(averages)
        for name, tensor in average.items()
    }
    about = json.dumps({"format": FORMAT, "widths": widths, "step": step})
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, {"averages": about})  # of several keys, in any order
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(folder)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error


def snapshots_of(run_dir: Path, until: int) -> list[Snapshot]:
    """Return what a run has stored before step `until`, by step."""
    found = []
    for file in _files(run_dir):
        if _step(file) >= until:
            continue
        try:
            with safe_open(file, "pt") as opened:
                about = json.loads(opened.metadata()["averages"])
            version, widths = about["format"], about["widths"]
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise damaged(file) from error
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}: mend that, or delete it") from error
        check_format(file, version, FORMAT)
        found.append(Snapshot(file, _step(file), widths))
    return found


def damaged(file: Path) -> UserError:
    """Return what is said of a file that can't be read."""
    return UserError(f"{file}: the stored averages are damaged: delete the file")


def begin_snapshots(run_dir: Path, start: int, resumed: Path | None) -> None:
    """Make a run's folder what it was at step `start`; `resumed` may be another run's checkpoint.

    What was written after that step is of a run that is not gone on with; unfinished files go too.
    """
    folder = run_dir / FOLDER
    if folder.is_dir():
        tidy(folder)
    for file in _files(run_dir):
        if _step(file) > start:
            file.unlink()
    if resumed is None:
        return
    origin = resumed.parent.parent
    for file in _files(origin) if origin.resolve() != run_dir.resolve() else ():
        if _step(file) <= start and not (folder / file.name).exists():
            folder.mkdir(exist_ok=True)
            second_name(file, folder / file.name)


def _files(run_dir: Path) -> list[Path]:
    try:
        names = sorted(file.name for file in (run_dir / FOLDER).iterdir())
    except FileNotFoundError:
        return []
    return [run_dir / FOLDER / name for name in names if _PATTERN.fullmatch(name)]


def _step(file: Path) -> int:
    match = _PATTERN.fullmatch(file.name)
    assert match is not None
    return int(match[1])
