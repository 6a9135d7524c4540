"""What all ViTs share, whatever library runs them: the tokens are the output of one block.

Shape suffixes: B images, N tokens (CLS first), C token width, S side of the input in pixels.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.tower import Tower, TowerInfo


@dataclass(frozen=True)
class Pixels:
    """From an RGB picture to a network's input, `[3, S, S]` float32."""

    size: int
    transform: Callable[[Image.Image], Any]
    facts: dict[str, Any]
    """What goes into the token index."""


class VitTower(Tower):
    """A tower whose tokens are one block's output, then normed where that is configured."""

    def __init__(
        self,
        config: TowerConfig,
        name: str,
        shape: TokenShape,
        depth: int,
        head: TowerHead,
        pixels: Pixels,
    ) -> None:
        super().__init__()
        if not -depth <= config.layer < depth:
            raise UserError(
                f"towers.*.layer={config.layer}: {name} has blocks 0 to {depth - 1}, or -1, -2 ..."
            )
        self.block = config.layer % depth
        self.info = TowerInfo(
            name=name if config.precision == "fp32" else f"{name}, {config.precision}",
            shape=shape,
            layer=config.layer,
            normed=config.norm,
            image_size=pixels.size,
            preprocessing=pixels.facts,
        )
        self.pixels, self.head = pixels, head
        self.dtype = DTYPES[config.precision]

    @abstractmethod
    def block_output(self, images_B3SS: Tensor) -> Tensor:
        """Return the output `[B, N, C]` of block number `self.block`, without registers."""

    def preprocess(self, image: Image.Image) -> Tensor:
        return self.pixels.transform(image.convert("RGB"))

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        tokens_BNC = self.block_output(images_B3SS.to(self.dtype))
        return self.head.normalise(tokens_BNC) if self.info.normed else tokens_BNC

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.head.describe(self.info.normed)


def square(side: tuple[int, int], name: str) -> int:
    height, width = side
    if height != width:
        raise UserError(f"{name} takes {height}x{width} pixels, not a square")
    return height


def trunk_shape(trunk: Any, name: str) -> TokenShape:
    """Return the shape of the tokens of a timm ViT."""
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if grid is None or prefix is None or not hasattr(trunk, "forward_intermediates"):
        raise UserError(f"{name} is no ViT with a patch grid ({type(trunk).__name__})")
    cls = getattr(trunk, "cls_token", None) is not None
    return TokenShape(grid=(grid[0], grid[1]), cls=cls, width=trunk.embed_dim)


def trunk_tokens(trunk: Any, images_B3SS: Tensor, block: int, cls: bool) -> Tensor:
    """Return a block's output of a timm ViT; of its prefix tokens, CLS alone."""
    output = trunk.forward_intermediates(
        images_B3SS,
        indices=[block],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    if not isinstance(output, tuple):  # no prefix tokens at all
        return output
    patches_BNC, prefix_BNC = output
    return torch.cat([prefix_BNC[:, :1], patches_BNC], dim=1) if cls else patches_BNC


def trunk_norm(trunk: Any) -> nn.Module:
    """Return a timm ViT's final norm: `norm`, or `fc_norm` where it pools before it norms."""
    fc_norm = getattr(trunk, "fc_norm", None)
    return fc_norm if fc_norm is not None and isinstance(trunk.norm, nn.Identity) else trunk.norm


def open_clip_tokens(visual: Any, images_B3SS: Tensor, block: int) -> Tensor:
    """Return a block's output of open_clip's own ViT."""
    output = visual.forward_intermediates(
        images_B3SS,
        indices=[block],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    cls_B1C, patches_BNC = output["image_intermediates_prefix"][0], output["image_intermediates"][0]
    return torch.cat([cls_B1C, patches_BNC], dim=1)
