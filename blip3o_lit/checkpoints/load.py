"""A trained translator from wherever it lies: checkpoint, run directory, export or hub.

What is read are tensors and plain data only.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from blip3o_lit.base.files import check_format, sha256_of
from blip3o_lit.base.shape import PairShape
from blip3o_lit.checkpoints.sharded import PLAIN
from blip3o_lit.checkpoints.solvers import SOLVERS_FILE, content_hash, kept_solvers
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.registry import check_origins
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.drawing.drawer import READOUT_FILE
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import PRECISIONS, cast_weights
from blip3o_lit.tokens.scales import identity_scales
from blip3o_lit.translation.translator import Translator

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_IN_FOLDER = (
    *(WEIGHTS_FILE, "checkpoints/best.ckpt", "checkpoints/last.ckpt"),
    *("best.ckpt", "last.ckpt"),
)
PARTS = ("network", "objective", "condition_standardizer", "target_standardizer")
PARTS += ("words_standardizer",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Loaded:
    """A translator and what is known about it."""

    translator: Translator
    config: TrainConfig
    shape: PairShape
    facts: dict[str, Any]
    """Plain data of the checkpoint: format, version, config, shape, tokens, step."""
    file: Path
    """The file that the weights came from."""
    as_stored: bool
    """Whether every weight has the format that it has in that file."""

    @property
    def device(self) -> torch.device:
        return next(self.translator.network.parameters()).device

    @cached_property
    def hash(self) -> str:
        """sha256 of the weight file, or of a folder's list of checksums."""
        return sha256_of(self.file / PLAIN if self.file.is_dir() else self.file)

    @cached_property
    def content(self) -> str:
        """sha256 of the weights as stored and of the flow, the same in a run and its export."""
        return content_hash(self.config.flow, read_weights(self.file)[1])

    @property
    def folder(self) -> Path:
        """The run directory or exported folder that the weights belong to."""
        parent = self.file.parent
        return parent.parent if parent.name == "checkpoints" else parent


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


def load(source: str | Path, device: str | torch.device = "cpu", as_stored: bool = False) -> Loaded:
    """Rebuild a translator from a checkpoint, a run directory, an export or a hub id.

    Args:
        source: See `find_weights`.
        device: Where it goes.
        as_stored: Keep every weight in its own format, to be written again; otherwise those of
            products get the format that they are used in.
    """
    file = find_weights(source)
    facts, state = read_weights(file)
    check_origins(str(file), facts.get("parts"))
    try:
        config = OmegaConf.to_object(
            OmegaConf.merge(OmegaConf.structured(TrainConfig), facts["config"])
        )
    except (OmegaConfBaseException, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: its config is of another version ({reason})") from error
    assert isinstance(config, TrainConfig)
    shape = PairShape.from_dict(facts["shape"])
    try:
        if config.model.depth > len(state):
            raise RuntimeError(f"{config.model.depth} blocks, {len(state)} tensors")
        with torch.device("meta"):  # what the config asks for may not fit into any memory
            sizes = {name: tensor.to("meta") for name, tensor in state.items()}
            _translator(config, shape, "cpu").load_state_dict(sizes)
        translator = _translator(config, shape, device)
        translator.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: its weights do not fit its config: {reason}") from error
    translator.to(device).eval().requires_grad_(False)
    if translator.autocast is not None and not as_stored:
        cast_weights(translator.network, translator.autocast)
    loaded = Loaded(translator, config, shape, facts, file, as_stored)
    solvers = loaded.folder / SOLVERS_FILE
    if solvers.is_file():
        translator.fitted = kept_solvers(solvers, content_hash(config.flow, state))
    return loaded


def _translator(config: TrainConfig, shape: PairShape, device: str | torch.device) -> Translator:
    scales = identity_scales(shape)
    return Translator(
        build_network(config.model, shape),
        FlowObjective(config.flow),
        scales.get("condition_standardizer"),
        scales["target_standardizer"],
        PRECISIONS[config.precision.name].inference(device),
        scales.get("words_standardizer"),
    )


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


def best_device() -> str:
    """Return cuda, mps or cpu, the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
