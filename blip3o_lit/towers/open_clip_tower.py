"""Any ViT of open_clip as a tower: a pretrained tag, a checkpoint file, a folder or a hub model."""

from functools import cached_property
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import TowerHead
from blip3o_lit.towers.open_clip_source import Source, find_source
from blip3o_lit.towers.refusals import mismatch
from blip3o_lit.towers.vit import (
    Pixels,
    VitTower,
    open_clip_tokens,
    square,
    trunk_norm,
    trunk_shape,
    trunk_tokens,
)


class OpenClipTower(VitTower):
    """A CLIP model of open_clip: image tokens, and caption embeddings through its own tokenizer."""

    def __init__(self, model: Any, config: TowerConfig, source: Source) -> None:
        visual: Any = model.visual
        name = f"open_clip:{source.label}"
        is_timm = isinstance(model.visual, TimmModel)
        if is_timm:
            shape, depth = trunk_shape(visual.trunk, name), len(visual.trunk.blocks)
            head = _timm_head(visual, model.logit_scale)
        elif isinstance(model.visual, VisionTransformer):
            shape = TokenShape(tuple(visual.grid_size), True, visual.conv1.out_channels)
            depth = len(visual.transformer.resblocks)
            head = _native_head(visual, model.logit_scale)
        else:
            raise UserError(f"{name} is no ViT with a patch grid ({type(visual).__name__})")
        super().__init__(config, name, shape, depth, head, _pixels(visual, name))
        self._is_timm, self.source = is_timm, source
        self.model = model.to(self.dtype)

    def block_output(self, images_B3SS: Tensor) -> Tensor:
        visual: Any = self.model.visual
        if self._is_timm:
            return trunk_tokens(visual.trunk, images_B3SS, self.block, self.info.shape.cls)
        return open_clip_tokens(visual, images_B3SS, self.block)

    @cached_property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self.source.model, self.info.name)

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor:
        words_BL = self._tokenizer(captions).to(self.device)
        text_BP = self.model.encode_text(words_BL).float()
        return nn.functional.normalize(text_BP, dim=-1)


def tokenizer_of(model: str, name: str) -> Any:
    """Return open_clip's tokenizer of a model; `name` is the tower's."""
    try:
        return open_clip.get_tokenizer(model)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name}: its tokenizer could not be built ({mismatch(error)}); "
            "SigLIP's needs `pip install transformers` and a download"
        ) from error


def _native_head(visual: Any, logit_scale: Tensor) -> TowerHead:
    """Return the head of open_clip's own ViT; one behind an attention pool is not per token."""
    if visual.attn_pool is not None:
        return TowerHead(nn.Identity(), logit_scale=logit_scale)
    return TowerHead(visual.ln_post, visual.proj, logit_scale)


def _timm_head(visual: Any, logit_scale: Tensor) -> TowerHead:
    trunk = visual.trunk
    linear = getattr(visual.head, "proj", trunk.head)
    if getattr(trunk, "attn_pool", None) is not None or not isinstance(linear, nn.Linear):
        return TowerHead(trunk_norm(trunk), logit_scale=logit_scale)
    return TowerHead(trunk_norm(trunk), linear.weight.T, logit_scale, linear.bias)


def _pixels(visual: Any, name: str) -> Pixels:
    """Return open_clip's evaluation transform of the checkpoint."""
    size = square(visual.image_size, name)
    config = PreprocessCfg(**visual.preprocess_cfg)
    facts = {
        "size": size,
        "resize": config.resize_mode,
        "interpolation": config.interpolation,
        "mean": list(config.mean),
        "std": list(config.std),
        "fill": config.fill_color,
    }
    transform: Any = image_transform_v2(config, is_train=False)
    return Pixels(size, transform, facts)


def create(config: TowerConfig, pretrained: bool, device: str) -> tuple[Any, Source]:
    """Return a model of open_clip, and where it came from."""
    source = find_source(config, pretrained)
    load = pretrained and device != "meta"
    build_on = device if device == "meta" else "cpu"
    try:
        with torch.device(build_on):
            model = open_clip.create_model(
                source.model,
                pretrained=source.weights if load else None,
                load_weights=load,
                device=build_on,
                force_quick_gelu=source.quick_gelu,
                force_image_size=config.image_size,
                force_preprocess_cfg=source.pixels,
                pretrained_text=False,
                require_pretrained=load,
            )
    except (RuntimeError, OSError, ValueError, KeyError, ImportError) as error:
        if "loading state_dict" in str(error):
            place = source.weights or source.model
            reason = f"{place}: not the weights of {source.model}"
        else:
            reason = f"{source.label}: could not be loaded"
        raise UserError(f"{reason}: {mismatch(error)}") from error
    return model, source


def load_open_clip(config: TowerConfig, pretrained: bool, device: str) -> OpenClipTower:
    model, source = create(config, pretrained, device)
    return OpenClipTower(model, config, source).to(device)
