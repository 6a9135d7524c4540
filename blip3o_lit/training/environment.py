"""What a run records of the machine and the packages, and which library noise it keeps off."""

from __future__ import annotations

import logging
import os
import platform
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import blip3o_lit

PACKAGES = (
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "torchmetrics",
    "open_clip_torch",
    "timm",
    "webdataset",
    "numpy",
    "safetensors",
)
# Warnings that a user of this project cannot act on, by the start of their message.
KNOWN_NOISE = (
    "The 'train_dataloader' does not have many workers",
    "The 'val_dataloader' does not have many workers",
    "`isinstance(treespec, LeafSpec)` is deprecated",
    "The number of training batches",
    "Trying to infer the `batch_size` from an ambiguous collection",
    "You defined a `validation_step` but have no `val_dataloader`",
    "`torch.jit.script` is deprecated",
    "FSDP2-wrapped module (",
    "torch.distributed.nn.functional.all_gather is deprecated",
    "torch.distributed is disabled, unavailable or uninitialized",
    "Starting from v1.9.0, `tensorboardX` has been removed",
)


def environment() -> dict[str, Any]:
    """Return versions, devices and the commit, without names of users or secrets."""
    return {
        "blip3o_lit": blip3o_lit.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version_of(package) for package in PACKAGES},
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the checkout's commit, with a mark when it has changes; None outside one."""
    folder = Path(__file__).resolve().parent
    try:
        return subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def own_defaults() -> Iterator[None]:
    """Make new tensors fp32 and on the CPU, where the caller set other defaults for torch."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        # As a context, a device slows every operation: only where it is needed.
        with torch.device("cpu") if device.type != "cpu" else nullcontext():
            yield
    finally:
        torch.set_default_dtype(dtype)


def quiet_libraries() -> None:
    """Keep off the console what libraries say about themselves; warnings that matter still pass."""
    for message in KNOWN_NOISE:
        warnings.filterwarnings("ignore", message=".*" + re.escape(message))
    for part in ("pytorch", "fabric"):
        for module in ("", ".utilities.rank_zero", ".utilities.distributed"):
            logging.getLogger(f"lightning.{part}{module}").setLevel(logging.WARNING)
