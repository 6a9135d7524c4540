"""Any ViT of timm as a tower, and the reading of a ViT trunk that open_clip and EVA-CLIP share.

Register and distillation tokens are dropped; the CLS token, where there is one, comes first.

Shape suffixes: B images, N tokens, C token width, S side of the input in pixels.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import load_state_dict
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError, nearest
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.towers.weight_files import mismatch

PIXEL_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


def trunk_shape(trunk: Any, model: str) -> TokenShape:
    """Return grid, CLS and width of a timm ViT's tokens.

    Raises:
        UserError: If the network is no ViT with a fixed patch grid.
    """
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    prefix = getattr(trunk, "num_prefix_tokens", None)
    if grid is None or prefix is None or not hasattr(trunk, "forward_intermediates"):
        raise UserError(f"{model} is no ViT with a patch grid ({type(trunk).__name__})")
    cls = getattr(trunk, "cls_token", None) is not None
    return TokenShape(grid=(grid[0], grid[1]), cls=cls, width=trunk.embed_dim)


def trunk_tokens(trunk: Any, pixels_B3SS: Tensor, layer: int, cls: bool) -> Tensor:
    """Return a block's output `[B, N, C]`, CLS first where there is one, other prefixes dropped."""
    found = trunk.forward_intermediates(
        pixels_B3SS,
        indices=[layer],
        return_prefix_tokens=True,
        stop_early=True,
        output_fmt="NLC",
        intermediates_only=True,
    )[0]
    if not isinstance(found, tuple):  # no prefix tokens at all
        return found
    patches_BNC, prefix_BNC = found
    return torch.cat([prefix_BNC[:, :1], patches_BNC], dim=1) if cls else patches_BNC


def trunk_norm(trunk: Any) -> Any:
    """Return the final norm: `norm`, or `fc_norm` of networks that pool before they norm."""
    norm = trunk.norm
    fc_norm = getattr(trunk, "fc_norm", None)
    return norm if fc_norm is None or not isinstance(norm, nn.Identity) else fc_norm


def block_index(layer: int, depth: int, model: str) -> int:
    """Return a block's number from 0 on; `layer` may count from the end.

    Raises:
        UserError: If the tower has no such block.
    """
    if not -depth <= layer < depth:
        raise UserError(
            f"towers.*.layer={layer}: {model} has blocks 0 to {depth - 1}, or -1, -2 ..."
        )
    return layer % depth


class TimmTower(Tower):
    """A ViT of timm without its classifier."""

    def __init__(self, trunk: Any, config: TowerConfig, name: str) -> None:
        """Read the trunk's facts and cast it to the configured precision."""
        super().__init__()
        shape = trunk_shape(trunk, config.model or "")
        height, width = trunk.patch_embed.img_size
        if height != width:
            raise UserError(f"{config.model} takes {height}x{width} pixels, not a square")
        data = resolve_model_data_config(trunk)
        data["input_size"] = (3, height, width)
        facts = {key: data[key] for key in PIXEL_KEYS}
        facts |= {"mean": list(data["mean"]), "std": list(data["std"]), "size": height}
        self.info = TowerInfo(
            name=name,
            shape=shape,
            layer=config.layer,
            normed=config.norm,
            image_size=height,
            preprocessing=facts,
        )
        self._block = block_index(config.layer, len(trunk.blocks), config.model or "")
        self._transform: Any = create_transform(**data, is_training=False)
        self.head = TowerHead(trunk_norm(trunk))
        self.dtype = DTYPES[config.precision]
        self.trunk = trunk.to(self.dtype)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Apply timm's evaluation transform of this model; returns `[3, S, S]` float32."""
        return self._transform(image.convert("RGB"))

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the block's output `[B, N, C]` in the tower's precision."""
        pixels = images_B3SS.to(self.dtype)
        tokens_BNC = trunk_tokens(self.trunk, pixels, self._block, self.info.shape.cls)
        return self.head.normalise(tokens_BNC) if self.info.normed else tokens_BNC

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the final norm; a timm classifier is no projection."""
        return self.head.describe(self.info.normed)


def load_timm(config: TowerConfig, pretrained: bool, device: str) -> TimmTower:
    """Build a timm tower.

    Args:
        config: `model` is an architecture (`vit_base_patch14_dinov2`), `pretrained` a tag of it
            (`lvd142m`) or a local checkpoint file.
        pretrained: False for random weights.
        device: Where the weights go; `meta` for shapes alone.

    Raises:
        UserError: If the model, tag or file does not exist or does not fit.
    """
    model, weights = config.model or "", config.pretrained
    if "." in model or not timm.is_model(model):
        guess = nearest(model.partition(".")[0], timm.list_models())
        hint = f"did you mean towers.*.model={guess}? " if guess else ""
        raise UserError(
            f"towers.*.model={model} is no timm model: {hint}A tag goes into towers.*.pretrained"
        )
    tags = [name.split(".", 1)[1] for name in timm.list_models(f"{model}.*", pretrained=True)]
    file = Path(weights).expanduser() if weights and weights not in tags else None
    if file is not None and pretrained and not file.is_file():
        guess = nearest(str(weights), tags)
        raise UserError(
            f"towers.*.pretrained={weights} is neither a file nor a tag of {model}: "
            f"{f'did you mean {guess}? ' if guess else ''}tags are {', '.join(tags) or 'none'}"
        )
    tag = weights if weights in tags else None
    options: dict[str, Any] = {"num_classes": 0}
    if config.image_size:
        options["img_size"] = config.image_size
    full = f"{model}.{tag}" if tag else model
    try:
        with torch.device(device if device == "meta" else "cpu"):
            trunk = timm.create_model(
                full, pretrained=pretrained and tag is not None and device != "meta", **options
            )
        if pretrained and file is not None and device != "meta":
            _load_file(trunk, file, model)
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(f"{full}: could not be built: {mismatch(error)}") from error
    source = (tag or Path(str(weights)).name) if pretrained else "random"
    suffix = "" if config.precision == "fp32" else f", {config.precision}"
    return TimmTower(trunk, config, f"timm:{model}/{source}{suffix}").to(device)


def _load_file(trunk: Any, file: Path, model: str) -> None:
    """Load a checkpoint, remapped as timm does for this model; all but the classifier must fit."""
    state = load_state_dict(str(file), weights_only=True)
    remap = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if remap is not None:
        state = remap(state, trunk)
    kept = {name: value for name, value in state.items() if not name.startswith("head.")}
    try:
        trunk.load_state_dict(kept, strict=True)
    except RuntimeError as error:
        raise UserError(f"{file}: not the weights of {model}: {mismatch(error)}") from error
