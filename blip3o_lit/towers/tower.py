"""What every frozen image encoder offers, whatever library it comes from.

Shape suffixes: B images, N tokens (CLS first where there is one), C token width, P projected.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from blip3o_lit.base.shape import TokenShape


@dataclass(frozen=True)
class TowerInfo:
    """Facts about a tower that go into the token index."""

    name: str
    """Architecture and weights, for example `open_clip:ViT-L-14/openai`."""
    shape: TokenShape
    """Grid, CLS and width of its tokens."""
    layer: int = -1
    """Block whose output the tokens are; -1 is the last."""
    normed: bool = False
    """Whether the tower's final norm has been applied to the tokens."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """Mean, std, interpolation, resize mode: all that turns a picture into the input."""


class Tower(nn.Module, ABC):
    """A frozen image encoder."""

    info: TowerInfo

    @abstractmethod
    def preprocess(self, image: Image.Image) -> Tensor:
        """Turn one RGB picture into a `[3, S, S]` float32 input."""

    @abstractmethod
    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the tokens `[B, N, C]` of a batch, CLS first where the tower has one."""

    @abstractmethod
    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the final norm, projection and logit scale, as `tokens/store/heads.py` reads them.

        Returns:
            Tensors `norm.weight`, `norm.bias`, `projection` `[C, P]`, `logit_scale` (those that
            exist) and metadata `norm` (layer, rms or none) and `eps`.
        """

    def encode_text(self, captions: list[str]) -> Tensor | None:
        """Return unit-norm caption embeddings `[B, P]`, or None when the tower has no text side."""
        return None

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device


class TowerCost(NamedTuple):
    """What a tower takes."""

    parameters: int
    """Weights, those of a text side included."""
    bytes: int
    """Memory of the weights in the tower's precision."""
    flops: int
    """Floating-point operations per image, matrix products alone; a multiply-add is 2."""


def tower_cost(tower: Tower) -> TowerCost:
    """Count a tower that was loaded on the `meta` device; nothing is computed."""
    size = tower.info.image_size
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tower.tokens(torch.zeros(1, 3, size, size, device="meta"))
    weights = list(tower.parameters())
    return TowerCost(
        parameters=sum(weight.numel() for weight in weights),
        bytes=sum(weight.nbytes for weight in weights),
        flops=counter.get_total_flops(),
    )
