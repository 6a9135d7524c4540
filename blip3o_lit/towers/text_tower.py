"""Text encoders whose token states condition the flow: captions in, a state per word piece out.

Shape suffixes: B captions, L positions, E width of a state.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TRANSFORMERS, TextTowerConfig
from blip3o_lit.towers.load import RANDOM_SEED


@dataclass(frozen=True)
class TextInfo:
    """Facts about a text tower that go into the token index."""

    name: str
    """Architecture and weights, for example `open_clip:ViT-L-14/openai, text`."""
    width: int
    """Channels of a state."""
    longest: int
    """Most states of a caption; longer ones are cut by the tokenizer."""
    source: dict[str, str] = field(default_factory=dict)
    """The keys of `towers.text` that build it on any machine, where there are such."""


class TextTower(nn.Module, ABC):
    """A frozen text encoder; states are taken behind its final norm, before any projection."""

    info: TextInfo

    @abstractmethod
    def padded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return all states `[B, L, E]`, and how many of each row are no padding `[B]` int64."""

    def check(self, captions: list[str]) -> None:
        """Raise UserError at a word that says nothing to the tower; most read any text."""

    @torch.inference_mode()
    def states(self, captions: list[str]) -> list[Tensor]:
        """Return each caption's states `[L, E]`, up to and with its end word, without padding."""
        if not captions:
            return []
        states_BLE, length_B = self.padded(captions)
        return [row[:length] for row, length in zip(states_BLE, length_B.tolist(), strict=True)]

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device


def load_text_tower(
    config: TextTowerConfig, pretrained: bool = True, device: str = "cpu"
) -> TextTower:
    """Build a text tower: frozen, in evaluation mode, in the configured precision, on a device.

    Args:
        config: The tower; its `kind` is not null.
        pretrained: False for random weights with a fixed seed; a tokenizer is read all the same
            where it is not CLIP's.
        device: Where its weights go; `meta` builds the shapes alone.

    Raises:
        UserError: If the model, its weights or its tokenizer do not exist or do not fit.
    """
    if config.kind == "demo":
        from blip3o_lit.towers.demo_text import load_demo_text as load
    elif config.kind == "open_clip":
        from blip3o_lit.towers.open_clip_text import load_open_clip_text as load
    elif config.kind in TRANSFORMERS:
        from blip3o_lit.towers.transformers_text import load_transformers_text as load
    else:
        raise UserError("towers.text.kind is missing: demo, open_clip or transformers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        tower = load(config.tower, pretrained, device)
    tower.info = replace(tower.info, source=_source(config) if pretrained else {})
    return tower.eval().requires_grad_(False)


def _source(config: TextTowerConfig) -> dict[str, str]:
    """Return a configuration's keys, where they name no file of this machine."""
    weights = config.pretrained or ""
    folder = (config.model or "").startswith("local-dir:")
    if folder or (weights and Path(weights).expanduser().exists()):
        return {}
    return {key: value for key, value in asdict(config).items() if value is not None}
