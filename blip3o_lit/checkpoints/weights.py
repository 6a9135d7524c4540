"""The weights of a translator as they lie: checkpoint, run directory, export or hub repository.

What is read are tensors and plain data only.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip3o_lit.base.files import check_format
from blip3o_lit.checkpoints.sharded import PLAIN
from blip3o_lit.checkpoints.solvers import SOLVERS_FILE
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.drawer import READOUT_FILE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_IN_FOLDER = (
    *(WEIGHTS_FILE, "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    *("best.ckpt", "last.ckpt"),
)
PARTS = ("network", "objective", "condition_standardizer", "target_standardizer")
PARTS += ("words_standardizer",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_weights(source: str | Path) -> Path:
    """Return the weight file that a path or hub id stands for.

    It may be a checkpoint, a run directory (best, else last), an exported folder, or the id of a
    repository on the Hugging Face Hub that holds one.
    """
    path = Path(source).expanduser()
    for name in ("", *WEIGHTS_IN_FOLDER):
        if (path / name).is_file() or (path / name / PLAIN).is_file():
            return path / name
    if path.is_dir():
        raise UserError(f"{path} holds neither checkpoints/best.ckpt nor {WEIGHTS_FILE}")
    if _HUB_ID.fullmatch(str(source)):
        return _from_hub(str(source))
    raise UserError(f"no checkpoint at {source}: give a .ckpt file, a run directory or an export")


def _from_hub(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            repository, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, READOUT_FILE, SOLVERS_FILE]
        )
    except Exception as error:  # the hub client raises some twenty classes; all mean the same here
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repository} is neither a path nor a model that the hub gives: {reason}"
        ) from error
    return find_weights(folder)


def folder_of(file: Path) -> Path:
    """Return the run directory or exported folder that a weight file belongs to."""
    return file.parent.parent if file.parent.name == "checkpoints" else file.parent


def read_weights(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what is known about a translator, and its state dict: that of its averaged weights."""
    return _read_export(file) if file.suffix == ".safetensors" else _read_checkpoint(file)


def _read_checkpoint(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the facts and the translator's state dict; the weight average is its network."""
    from blip3o_lit.checkpoints import files as checkpointing

    checkpoint = checkpointing.load(file, without_optimizer=True)
    saved, state = checkpoint.get("state_dict"), {}
    if not isinstance(saved, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in saved.items()
    ):
        raise checkpointing.damaged(file)
    for name, tensor in saved.items():
        part, _, rest = name.partition(".")
        part = {"ema": "network", "network": "trained"}.get(part, part)
        if part in PARTS:
            state[f"{part}.{rest}"] = tensor
    return checkpoint["blip3o"], state


def _read_export(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from blip3o_lit.checkpoints import files as checkpointing

    config = file.with_name(CONFIG_FILE)
    try:
        facts = json.loads(config.read_text("utf-8"))
        state = load_file(file)
        known = {"config", "shape", "tokens", "step"} <= set(facts)
    except FileNotFoundError as error:
        raise UserError(f"{config} is missing: export again") from error
    except (ValueError, SafetensorError, TypeError) as error:
        raise UserError(f"{file.parent}: the export is damaged: export again") from error
    if not known:
        raise UserError(f"{config} was not written by blip3o_lit's export")
    check_format(config, facts.get("format", checkpointing.FORMAT), checkpointing.FORMAT)
    return facts, state
