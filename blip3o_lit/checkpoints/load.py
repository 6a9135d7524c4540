"""A trained translator from wherever it lies: checkpoint, run directory, export or hub.

What is read are tensors and plain data only.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from blip3o_lit.base.files import sha256_of
from blip3o_lit.base.shape import PairShape
from blip3o_lit.checkpoints.averages import averages
from blip3o_lit.checkpoints.sharded import PLAIN
from blip3o_lit.checkpoints.solvers import SOLVERS_FILE, content_hash, kept_solvers
from blip3o_lit.checkpoints.soup import souped
from blip3o_lit.checkpoints.weights import find_weights, folder_of, read_weights
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.registry import check_origins
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import PRECISIONS, cast_weights
from blip3o_lit.tokens.scales import identity_scales
from blip3o_lit.translation.translator import Translator


@dataclass(frozen=True)
class Weights:
    """Which weights: those of a file, another average of its run, or the mean of several files."""

    file: Path
    width: float | None = None
    """Of the average, where it isn't the file's own."""
    others: tuple[Path, ...] = ()
    """Files whose weights are averaged with those."""

    @cached_property
    def hash(self) -> str:
        """sha256 of the weight file, or of a folder's list of checksums."""
        return sha256_of(self.file / PLAIN if self.file.is_dir() else self.file)

    @property
    def folder(self) -> Path:
        """The run directory or exported folder that the weights belong to."""
        return folder_of(self.file)

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what is known about a translator, and its state dict."""
        if self.others:
            return souped([self.file, *self.others])
        facts, state = read_weights(self.file)
        if self.width is None:
            return facts, state
        return averages(self.file, facts, [self.width])[self.width].put(facts, state)


@dataclass(frozen=True)
class Loaded:
    """A translator and what is known about it."""

    translator: Translator
    config: TrainConfig
    shape: PairShape
    facts: dict[str, Any]
    """Plain data of the checkpoint: format, version, config, shape, tokens, step."""
    weights: Weights
    as_stored: bool
    """Whether every weight has the format that it has in that file."""

    @property
    def file(self) -> Path:
        """The file that the weights came from, the first of several."""
        return self.weights.file

    @property
    def folder(self) -> Path:
        """The run directory or exported folder that the weights belong to."""
        return self.weights.folder

    @property
    def hash(self) -> str:
        """See `Weights.hash`."""
        return self.weights.hash

    @property
    def device(self) -> torch.device:
        return next(self.translator.network.parameters()).device

    @cached_property
    def content(self) -> str:
        """sha256 of the weights as stored and of the flow, the same in a run and its export."""
        return content_hash(self.config.flow, self.weights.read()[1])


def load(
    source: str | Path | Weights, device: str | torch.device = "cpu", as_stored: bool = False
) -> Loaded:
    """Rebuild a translator from a checkpoint, a run directory, an export or a hub id.

    Args:
        source: See `find_weights`.
        device: Where it goes.
        as_stored: Keep every weight in its own format, to be written again; otherwise those of
            products get the format that they are used in.
    """
    weights = source if isinstance(source, Weights) else Weights(find_weights(source))
    return _built(weights, *weights.read(), device, as_stored)


def load_averages(loaded: Loaded, widths: list[float]) -> dict[float, Loaded]:
    """Return a translator with other averages of its run's weights, by width."""
    facts, state = read_weights(loaded.file)
    return {
        width: _built(
            Weights(loaded.file, width), *average.put(facts, state), loaded.device, as_stored=False
        )
        for width, average in averages(loaded.file, facts, widths).items()
    }


def _built(
    weights: Weights,
    facts: dict[str, Any],
    state: dict[str, Tensor],
    device: str | torch.device,
    as_stored: bool,
) -> Loaded:
    file = weights.file
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
    loaded = Loaded(translator, config, shape, facts, weights, as_stored)
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


def best_device() -> str:
    """Return cuda, mps or cpu, the first that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
