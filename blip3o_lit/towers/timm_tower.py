"""Any ViT of timm as a tower, without its classifier."""

import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from timm.models import load_state_dict
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import TowerHead
from blip3o_lit.towers.refusals import mismatch, unknown_model, unknown_weights
from blip3o_lit.towers.vit import Pixels, VitTower, square, trunk_norm, trunk_shape, trunk_tokens
from blip3o_lit.towers.weight_files import assign

PIXEL_KEYS = ("interpolation", "crop_pct", "crop_mode", "mean", "std")


class TimmTower(VitTower):
    def __init__(
        self, trunk: Any, config: TowerConfig, name: str, head: TowerHead, pixels: Pixels
    ) -> None:
        super().__init__(config, name, trunk_shape(trunk, name), len(trunk.blocks), head, pixels)
        self.trunk = trunk.to(self.dtype)

    def block_output(self, images_B3SS: Tensor) -> Tensor:
        return trunk_tokens(self.trunk, images_B3SS, self.block, self.info.shape.cls)


def load_timm(config: TowerConfig, pretrained: bool, device: str) -> TimmTower:
    """Build an architecture (`vit_base_patch14_dinov2`) with a tag (`lvd142m`) or a local file."""
    model, weights = config.model or "", config.pretrained
    if "." in model or not timm.is_model(model):
        advice = "A tag goes into towers.*.pretrained"
        raise unknown_model(model, "timm", timm.list_models(), advice)
    tags = [name.split(".", 1)[1] for name in timm.list_models(f"{model}.*", pretrained=True)]
    tag = weights if weights in tags else None
    file = Path(weights).expanduser() if weights and not tag else None
    if file is not None and pretrained and not file.is_file():
        raise unknown_weights(weights, model, tags)
    full_name = f"{model}.{tag}" if tag else model
    load = pretrained and device != "meta"
    size: dict[str, Any] = {"img_size": config.image_size} if config.image_size else {}
    try:
        with torch.device(device if device == "meta" else "cpu"):
            trunk = timm.create_model(
                full_name, pretrained=load and tag is not None, num_classes=0, **size
            )
        if file is not None and load:
            _load_file(trunk, file, model)
    except (RuntimeError, OSError, TypeError) as error:
        raise UserError(f"{full_name}: could not be built: {mismatch(error)}") from error
    label = (tag or Path(str(weights)).name) if pretrained else "random"
    name = f"timm:{model}/{label}"
    trunk_shape(trunk, name)  # refuses what is no ViT, whose size and norm would not be found
    head, pixels = TowerHead(trunk_norm(trunk)), _pixels(trunk, name)
    return TimmTower(trunk, config, name, head, pixels).to(device)


def _pixels(trunk: Any, name: str) -> Pixels:
    """Return timm's own evaluation transform for this model."""
    size = square(trunk.patch_embed.img_size, name)
    data = resolve_model_data_config(trunk)
    data["input_size"] = (3, size, size)
    facts = {key: data[key] for key in PIXEL_KEYS}
    facts |= {"mean": list(data["mean"]), "std": list(data["std"]), "size": size}
    transform: Any = create_transform(**data, is_training=False)
    return Pixels(size, transform, facts)


def _load_file(trunk: Any, file: Path, model: str) -> None:
    """Load a checkpoint, remapped as timm does for this model; all but the classifier must fit."""
    state = load_state_dict(str(file), weights_only=True)
    remap = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
    if remap is not None:
        state = remap(state, trunk)
    tensors = {name: value for name, value in state.items() if not name.startswith("head.")}
    assign(trunk, tensors, str(file), model)
