"""Vision towers of transformers: CLIP, SigLIP, DINOv2 and 3, AIMv2 and other ViTs of `AutoModel`.

From a local folder or the hub: `config.json`, `model.safetensors` (or shards of it) and
`preprocessor_config.json`. Code that a repository brings is never run, and pickled weights are not
read. The tokens are a block's own output, before the final norm, by a hook on that block: what the
models call hidden states differs between them.

Shape suffixes: B images, N tokens (CLS first), C token width, P projection width, S side.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import SimpleTokenizer
from PIL import Image
from timm.layers.norm import RmsNorm
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.clip_pixels import ClipPixels
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.timm_tower import block_index
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.towers.transformers_folder import (
    UNREADABLE,
    check_model,
    clip_settings,
    random_network,
    read_network,
    read_pixels,
    read_settings,
)
from blip3o_lit.towers.weight_files import first_line

CLIP_WORDS = 49408
"""Size of CLIP's vocabulary; a text tower with another one has another tokenizer."""


class TransformersTower(Tower):
    """A ViT of transformers, with CLIP's text side where it has one."""

    def __init__(self, model: Any, config: TowerConfig, name: str, pixels: Any) -> None:
        """Find the model's blocks and their tokens; its weights are in place already."""
        super().__init__()
        vision = getattr(model, "vision_model", model)
        words = getattr(getattr(model.config, "text_config", None), "vocab_size", None)
        self._has_text = model.config.model_type == "clip" and words == CLIP_WORDS
        self.model = model if self._has_text else vision
        self._vision, blocks = (vision,), _blocks(vision, name)
        index = block_index(config.layer, len(blocks), name)
        del blocks[index + 1 :]
        self._last = (blocks[index],)
        self._pixels, self._tokenizer = pixels, None
        self._skipped = 0
        self.dtype = DTYPES[config.precision]
        projection = getattr(model, "visual_projection", None)
        self.head = TowerHead(
            _final_norm(vision),
            None if projection is None else projection.weight.T,
            getattr(model, "logit_scale", None),
        )
        if config.norm and self.head.kind == "none":
            raise UserError(f"towers.*.norm=true: {name} has no final norm")
        self.info = TowerInfo(
            name=name,
            shape=self._shape(vision, name),
            layer=config.layer,
            normed=config.norm,
            image_size=pixels.size,
            preprocessing=pixels.describe(),
        )

    def _shape(self, vision: Any, name: str) -> TokenShape:
        """Return grid, CLS and width, from a forward pass of shapes alone."""
        patch = getattr(vision.config, "patch_size", None)
        if not isinstance(patch, int):
            raise UserError(f"{name} is no ViT with a patch grid ({type(vision).__name__})")
        names = [name for name, _ in vision.named_parameters() if name.startswith("embeddings.")]
        cls = any(name.endswith((".cls_token", ".class_embedding")) for name in names)
        side = self._pixels.size // patch
        count, width = _token_shape(vision, self._pixels.size, name)
        # Before the patches come CLS, where there is one, then registers and the like.
        prefix = count - side * side
        if prefix < cls or prefix > 64:
            raise UserError(
                f"{name} gives {count} tokens, which are no {side}x{side} grid of patches"
            )
        self._skipped = prefix - cls
        return TokenShape((side, side), cls, width)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Apply the folder's preprocessing; returns `[3, S, S]` float32."""
        return self._pixels(image)

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the block's output `[B, N, C]`, CLS first where there is one, no registers."""
        tokens_BNC = _output(self._vision[0], self._last[0], images_B3SS.to(self.dtype))
        if self._skipped:
            cls = int(self.info.shape.cls)
            after = tokens_BNC[:, cls + self._skipped :]
            tokens_BNC = torch.cat([tokens_BNC[:, :cls], after], dim=1)
        return self.head.normalise(tokens_BNC) if self.info.normed else tokens_BNC

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the final norm, and projection and logit scale where the folder has them."""
        return self.head.describe(self.info.normed)

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor | None:
        """Return unit-norm caption embeddings `[B, P]` float32; None unless it is a whole CLIP."""
        if not self._has_text:
            return None
        self._tokenizer = self._tokenizer or SimpleTokenizer()
        words_BL = self._tokenizer(captions).to(self.device)
        pooled_BC = self.model.text_model(input_ids=words_BL).pooler_output
        return nn.functional.normalize(self.model.text_projection(pooled_BC).float(), dim=-1)


def _output(vision: Any, block: nn.Module, pixels_B3SS: Tensor) -> Tensor:
    """Return what `block` gives in a forward pass."""
    outputs: list[Any] = []
    hook = block.register_forward_hook(lambda module, given, output: outputs.append(output))
    try:
        vision(pixel_values=pixels_B3SS)
    finally:
        hook.remove()
    return outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]


def _token_shape(vision: Any, size: int, name: str) -> tuple[int, int]:
    """Return tokens and width of the last block's output, from a copy without weights."""
    try:
        shapes = random_network(vision.config, torch.float32, "meta")
        shapes = getattr(shapes, "vision_model", shapes)
        with torch.inference_mode():
            pixels = torch.zeros(1, 3, size, size, device="meta")
            output = _output(shapes, _blocks(shapes, name)[-1], pixels)
        _, count, width = output.shape
    except UNREADABLE as error:
        raise UserError(
            f"{name} can't take the {size}x{size} px of its preprocessing: {first_line(error)}"
        ) from error
    return count, width


def _blocks(vision: Any, name: str) -> nn.ModuleList:
    depth = getattr(vision.config, "num_hidden_layers", None)
    for module in vision.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(f"{name} is no ViT of equal blocks ({type(vision).__name__})")


def _final_norm(vision: nn.Module) -> nn.Module:
    """Return the last norm beside the blocks; CLIP has another one before them."""
    norms = [module for module in vision.children() if "norm" in type(module).__name__.lower()]
    norm: Any = norms[-1] if norms else nn.Identity()
    if "rmsnorm" in type(norm).__name__.lower():
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6))
        same = RmsNorm(norm.weight.shape[0], eps=eps, device="meta")
        same.weight = norm.weight
        return same
    return norm


def load_transformers(config: TowerConfig, pretrained: bool, device: str) -> TransformersTower:
    """Build a tower from a folder of transformers.

    Args:
        config: `pretrained` is a folder or a hub id; `model`, where set, a CLIP of open_clip that
            it must have the shapes of, and whose shapes random weights take.
        pretrained: False for random weights.
        device: Where the weights go; `meta` for shapes alone.

    Raises:
        UserError: If the folder is missing, holds no ViT or does not fit.
    """
    source, model = config.pretrained, config.model
    if not model and not source:
        raise UserError(f"towers.*.kind={config.kind} needs towers.*.pretrained=FOLDER or a hub id")
    # A name alone says the shapes, so that a plan or random weights need no folder.
    if source and not (model and (device == "meta" or not pretrained)):
        settings = read_settings(str(source))
        if model:
            check_model(settings, model, str(source))
        pixels = read_pixels(str(source), settings)
    else:
        settings = clip_settings(str(model))
        pixels = ClipPixels(settings.vision_config.image_size, settings.vision_config.image_size)
    dtype = DTYPES[config.precision]
    if pretrained and device != "meta":
        network = read_network(str(source), settings, dtype).to(device)
    else:
        network = random_network(settings, dtype, device)
    label = str(source).rstrip("/").split("/")[-1] if source else ""
    label = f"{model or label}/random" if not pretrained else label
    precision = "" if config.precision == "fp32" else f", {config.precision}"
    return TransformersTower(network, config, f"huggingface:{label}{precision}", pixels)
