"""Any ViT of open_clip as a tower: a pretrained tag, a checkpoint file, a folder or a hub model.

Two traps of open_clip are closed here. A checkpoint FILE silently gets the default mean and size
rule, whatever it was trained with: we take them from the pretrained tag `like`, from an
`open_clip_config.json` beside the file, or from the model's tags where all agree, and else refuse.
And the plain `ViT-L-14` runs OpenAI's weights with the wrong GELU: we set the tag's own.

Shape suffixes: B images, N tokens, C token width, P projection width, S side of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import VisionTransformer
from PIL import Image
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.open_clip_source import Source, find_source
from blip3o_lit.towers.timm_tower import block_index, trunk_norm, trunk_shape, trunk_tokens
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.towers.weight_files import mismatch


def native_tokens(visual: Any, pixels_B3SS: Tensor, layer: int) -> Tensor:
    """Return one block's output `[B, N, C]` of open_clip's own ViT, CLS first."""
    found = visual.forward_intermediates(
        pixels_B3SS,
        indices=[layer],
        stop_early=True,
        intermediates_only=True,
        output_fmt="NLC",
        output_extra_tokens=True,
    )
    return torch.cat(
        [found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1
    )


def native_head(visual: Any, logit_scale: Tensor | None) -> TowerHead:
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


class OpenClipTower(Tower):
    """A CLIP model of open_clip: image tokens, and caption embeddings through its own tokenizer."""

    def __init__(
        self,
        model: Any,
        config: TowerConfig,
        name: str,
        tokenizer: Callable[[], Callable[[list[str]], Tensor]],
    ) -> None:
        """Read the model's facts and cast it to the configured precision.

        Args:
            model: An open_clip model with `visual`, `encode_text` and `logit_scale`.
            config: Layer, norm and precision.
            name: For the token index.
            tokenizer: Builds the tokenizer; called when captions are first encoded.
        """
        super().__init__()
        visual: Any = model.visual
        self._is_timm = isinstance(model.visual, TimmModel)
        if self._is_timm:
            shape = trunk_shape(visual.trunk, name)
            depth = len(visual.trunk.blocks)
            self.head = _timm_head(visual, model.logit_scale)
        elif isinstance(model.visual, VisionTransformer):
            rows, columns = visual.grid_size
            shape = TokenShape((rows, columns), True, visual.conv1.out_channels)
            depth = len(visual.transformer.resblocks)
            self.head = native_head(visual, model.logit_scale)
        else:
            raise UserError(f"{name} is no ViT with a patch grid ({type(visual).__name__})")
        pixels = PreprocessCfg(**visual.preprocess_cfg)
        height, width = visual.image_size
        if height != width:
            raise UserError(f"{name} takes {height}x{width} pixels, not a square")
        self.info = TowerInfo(
            name=name,
            shape=shape,
            layer=config.layer,
            normed=config.norm,
            image_size=height,
            preprocessing=_facts(pixels, height),
        )
        self._block = block_index(config.layer, depth, name)
        self._transform: Any = image_transform_v2(pixels, is_train=False)
        self._build_tokenizer = tokenizer
        self._tokenizer: Callable[[list[str]], Tensor] | None = None
        self.dtype = DTYPES[config.precision]
        self.model = model.to(self.dtype)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Apply open_clip's evaluation transform of the checkpoint; returns `[3, S, S]` float32."""
        return self._transform(image.convert("RGB"))

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the block's output `[B, N, C]` in the tower's precision."""
        visual: Any = self.model.visual
        pixels = images_B3SS.to(self.dtype)
        if self._is_timm:
            tokens_BNC = trunk_tokens(visual.trunk, pixels, self._block, self.info.shape.cls)
        else:
            tokens_BNC = native_tokens(visual, pixels, self._block)
        return self.head.normalise(tokens_BNC) if self.info.normed else tokens_BNC

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the final norm, the projection where it is linear, and the logit scale."""
        return self.head.describe(self.info.normed)

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor:
        """Return unit-norm caption embeddings `[B, P]` float32.

        Raises:
            UserError: If the tokenizer needs a package or a download that is not there.
        """
        if self._tokenizer is None:
            try:
                self._tokenizer = self._build_tokenizer()
            except (ImportError, OSError, ValueError, RuntimeError) as error:
                raise UserError(
                    f"{self.info.name}: its tokenizer could not be built ({mismatch(error)}); "
                    "SigLIP's needs `pip install transformers` and a download"
                ) from error
        words_BL = self._tokenizer(captions).to(self.device)
        text_BP = self.model.encode_text(words_BL).float()
        return nn.functional.normalize(text_BP, dim=-1)


def load_open_clip(config: TowerConfig, pretrained: bool, device: str) -> OpenClipTower:
    """Build an open_clip tower.

    Args:
        config: `model` is an architecture, `local-dir:FOLDER` or `hf-hub:org/name`; `pretrained` a
            tag, a checkpoint file or an open_clip folder.
        pretrained: False for random weights.
        device: Where the weights go; `meta` for shapes alone.

    Raises:
        UserError: If the model, tag or file does not exist, does not fit or cannot be reached.
    """
    source = find_source(config, pretrained)
    load = pretrained and device != "meta"
    try:
        with torch.device(device if device == "meta" else "cpu"):
            model = open_clip.create_model(
                source.model,
                pretrained=source.weights if load else None,
                load_weights=load,
                device=device if device == "meta" else "cpu",
                force_quick_gelu=source.quick_gelu,
                force_image_size=config.image_size,
                force_preprocess_cfg=source.pixels,
                pretrained_text=False,
                require_pretrained=load,
            )
    except (RuntimeError, OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(_reason(source, error)) from error
    precision = "" if config.precision == "fp32" else f", {config.precision}"
    name = f"open_clip:{source.label}{precision}"
    tower = OpenClipTower(model, config, name, lambda: open_clip.get_tokenizer(source.model))
    return tower.to(device)


def _reason(source: Source, error: Exception) -> str:
    if "loading state_dict" in str(error):
        place = source.weights or source.model
        return f"{place}: not the weights of {source.model}: {mismatch(error)}"
    return f"{source.label}: could not be loaded: {mismatch(error)}"


def _facts(pixels: PreprocessCfg, size: int) -> dict[str, Any]:
    return {
        "size": size,
        "resize": pixels.resize_mode,
        "interpolation": pixels.interpolation,
        "mean": list(pixels.mean),
        "std": list(pixels.std),
        "fill": pixels.fill_color,
    }
