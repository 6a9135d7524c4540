"""Vision towers of transformers: CLIP, SigLIP, DINOv2 and 3, AIMv2 and other ViTs of `AutoModel`.

From a local folder or the hub: `config.json`, `model.safetensors` (or shards of it) and
`preprocessor_config.json`. Tokens come by a hook on a block, before the final norm: what the models
call hidden states differs between them.
"""

from functools import cached_property
from typing import Any

import torch
from open_clip import SimpleTokenizer
from timm.layers.norm import RmsNorm
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.clip_pixels import clip_pixels
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.hook import output_of
from blip3o_lit.towers.refusals import first_line
from blip3o_lit.towers.transformers_folder import (
    UNREADABLE,
    check_model,
    clip_settings,
    random_network,
    read_network,
    read_pixels,
    read_settings,
)
from blip3o_lit.towers.vit import Pixels, VitTower

CLIP_WORDS = 49408
"""Size of CLIP's vocabulary; a text tower with another one has another tokenizer."""


class TransformersTower(VitTower):
    """A ViT of transformers, with CLIP's text side where it has one."""

    def __init__(self, model: Any, config: TowerConfig, name: str, pixels: Pixels) -> None:
        vision = getattr(model, "vision_model", model)
        blocks = _blocks(vision, name)
        shape, registers = _token_shape(vision, pixels.size, name)
        projection = getattr(model, "visual_projection", None)
        head = TowerHead(
            _final_norm(vision),
            None if projection is None else projection.weight.T,
            getattr(model, "logit_scale", None),
        )
        if config.norm and head.kind == "none":
            raise UserError(f"towers.*.norm=true: {name} has no final norm")
        super().__init__(config, name, shape, len(blocks), head, pixels)
        self._registers = registers
        del blocks[self.block + 1 :]
        words = getattr(getattr(model.config, "text_config", None), "vocab_size", None)
        self._has_text = model.config.model_type == "clip" and words == CLIP_WORDS
        self.model = model if self._has_text else vision
        self._vision = (vision, blocks)  # in a tuple, which registers no weights twice

    def block_output(self, images_B3SS: Tensor) -> Tensor:
        tokens_BNC = _last_block(*self._vision, images_B3SS)
        if self._registers == 0:
            return tokens_BNC
        cls = int(self.info.shape.cls)
        patches_BNC = tokens_BNC[:, cls + self._registers :]
        return torch.cat([tokens_BNC[:, :cls], patches_BNC], dim=1)

    @cached_property
    def _tokenizer(self) -> SimpleTokenizer:
        return SimpleTokenizer()

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor | None:
        if not self._has_text:
            return None
        words_BL = self._tokenizer(captions).to(self.device)
        pooled_BC = self.model.text_model(input_ids=words_BL).pooler_output
        return nn.functional.normalize(self.model.text_projection(pooled_BC).float(), dim=-1)


def _blocks(vision: Any, name: str) -> nn.ModuleList:
    depth = getattr(vision.config, "num_hidden_layers", None)
    for module in vision.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"{name} is no ViT of equal blocks ({type(vision).__name__})")


def _last_block(vision: Any, blocks: nn.ModuleList, images_B3SS: Tensor) -> Tensor:
    output = output_of(blocks[-1], lambda: vision(pixel_values=images_B3SS))
    return output[0] if isinstance(output, tuple) else output


def _token_shape(vision: Any, size: int, name: str) -> tuple[TokenShape, int]:
    """Return the tokens' shape, and the number of registers between CLS and the patches."""
    patch = getattr(vision.config, "patch_size", None)
    if not isinstance(patch, int):
        raise UserError(f"{name} is no ViT with a patch grid ({type(vision).__name__})")
    try:  # a forward pass of shapes alone
        copy = random_network(vision.config, torch.float32, "meta")
        copy = getattr(copy, "vision_model", copy)
        with torch.inference_mode():
            pixels = torch.zeros(1, 3, size, size, device="meta")
            _, count, width = _last_block(copy, _blocks(copy, name), pixels).shape
    except UNREADABLE as error:
        raise UserError(
            f"{name} can't take the {size}x{size} px of its preprocessing: {first_line(error)}"
        ) from error
    names = [name for name, _ in vision.named_parameters() if name.startswith("embeddings.")]
    cls = any(name.endswith((".cls_token", ".class_embedding")) for name in names)
    side = size // patch
    registers = count - side * side - cls
    if not 0 <= registers <= 64:
        raise UserError(f"{name} gives {count} tokens, which are no {side}x{side} grid of patches")
    return TokenShape((side, side), cls, width), registers


def _final_norm(vision: nn.Module) -> nn.Module:
    """Return the last norm beside the blocks; CLIP has another one before them."""
    norms = [module for module in vision.children() if "norm" in type(module).__name__.lower()]
    norm: Any = norms[-1] if norms else nn.Identity()
    if "rmsnorm" in type(norm).__name__.lower():  # each model of transformers has its own class
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
        same = RmsNorm(norm.weight.shape[0], eps=eps, device="meta")
        same.weight = norm.weight
        return same
    return norm


def load_transformers(config: TowerConfig, pretrained: bool, device: str) -> TransformersTower:
    """Build a tower from a folder or hub id, `pretrained`, or the shapes of a CLIP of open_clip.

    Where both are set, the folder must have the shapes of that `model`.
    """
    source, model = config.pretrained, config.model
    if not model and not source:
        raise UserError(f"towers.*.kind={config.kind} needs towers.*.pretrained=FOLDER or a hub id")
    load = pretrained and device != "meta"
    # A name alone says the shapes, so that a plan or random weights need no folder.
    if source and (load or not model):
        settings = read_settings(source)
        if model:
            check_model(settings, model, source)
        pixels = read_pixels(source, settings)
    else:
        settings = clip_settings(str(model))
        size = settings.vision_config.image_size
        pixels = clip_pixels(size, size)
    dtype = DTYPES[config.precision]
    if load:
        network = read_network(str(source), settings, dtype).to(device)
    else:
        network = random_network(settings, dtype, device)
    label = str(source).rstrip("/").split("/")[-1] if source else ""
    label = label if pretrained else f"{model or label}/random"
    return TransformersTower(network, config, f"huggingface:{label}", pixels)
