"""EVA-CLIP-8B's image tower (Sun et al. 2024, arXiv:2402.04252), without remote code.

A pre-norm ViT: 224 px, patch 14, width 4096, 32 blocks, 32 heads of 128, a plain GELU MLP of ratio
5, RMSNorm (eps 1e-6), learned absolute positions, CLS; no bias on query, key and value, biases on
the patch embedding, the attention's output and the MLP; the head is an RMSNorm and a 4096 -> 1280
projection without bias. Sizes: EVA-CLIP-18B/shinji/eva_clip/model_configs/EVA-CLIP-8B.json of
github.com/baaivision/EVA. timm's VisionTransformer is this network, so timm runs it.

The text tower is not built: the condition needs none, and the target's captions come from its own.

Shape suffixes: B images, N tokens (CLS first), C token width, P projection width, S side.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.layers.norm import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from blip3o_lit.config.errors import one_of
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.clip_pixels import ClipPixels
from blip3o_lit.towers.eva_clip_weights import BATCHED, NAMES, wanted
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.renaming import rename
from blip3o_lit.towers.timm_tower import block_index, trunk_shape, trunk_tokens
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.towers.weight_files import assign, read, weight_files

EPSILON = 1e-6
RANDOM_STD = 0.02
"""Standard deviation of random matrices; the published initialisation's (truncated) normal."""


@dataclass(frozen=True)
class EvaClipArchitecture:
    """Sizes of an EVA-CLIP image tower."""

    image_size: int = 224
    patch: int = 14
    width: int = 4096
    depth: int = 32
    heads: int = 32
    mlp_ratio: float = 5.0
    projection: int = 1280

    def build(self, dtype: torch.dtype) -> VisionTransformer:
        """Build the network without weights, on the meta device."""
        trunk = VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch,
            num_classes=self.projection,
            global_pool="token",
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            qkv_bias=False,
            norm_layer=partial(RmsNorm, eps=EPSILON),
            weight_init="skip",
            device="meta",
            dtype=dtype,
        )
        trunk.head = nn.Linear(self.width, self.projection, bias=False, device="meta", dtype=dtype)
        return trunk


ARCHITECTURES = {
    "EVA-CLIP-8B": EvaClipArchitecture(),
    "EVA-CLIP-8B-448": EvaClipArchitecture(image_size=448),
}
"""The published pre-norm models; the 448 px one is called 8B-plus in the original files."""


class EvaClipTower(Tower):
    """An EVA-CLIP image tower."""

    def __init__(
        self, trunk: Any, config: TowerConfig, name: str, logit_scale: Tensor | None
    ) -> None:
        """Describe a network whose weights are in place."""
        super().__init__()
        size = trunk.patch_embed.img_size[0]
        self._pixels = ClipPixels(size, size)
        self.info = TowerInfo(
            name=name,
            shape=trunk_shape(trunk, name),
            layer=config.layer,
            normed=config.norm,
            image_size=size,
            preprocessing=self._pixels.describe(),
        )
        self._block = block_index(config.layer, len(trunk.blocks), name)
        self.head = TowerHead(trunk.norm, trunk.head.weight.T, logit_scale)
        self.trunk = trunk
        self.dtype = DTYPES[config.precision]

    def preprocess(self, image: Image.Image) -> Tensor:
        """Apply OpenAI CLIP's preprocessing, as both seeds did; returns `[3, S, S]` float32."""
        return self._pixels(image)

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the block's output `[B, N, C]`, which is `last_hidden_state` for layer=-1."""
        tokens_BNC = trunk_tokens(self.trunk, images_B3SS.to(self.dtype), self._block, cls=True)
        return self.head.normalise(tokens_BNC) if self.info.normed else tokens_BNC

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the final RMSNorm, the projection, and the logit scale where the file has one."""
        return self.head.describe(self.info.normed)


def load_eva_clip(
    config: TowerConfig,
    pretrained: bool,
    device: str,
    architecture: EvaClipArchitecture | None = None,
) -> EvaClipTower:
    """Build an EVA-CLIP tower; its weights are cast on the way in, so memory holds them once.

    Args:
        config: `model` names the architecture; `pretrained` is a `.pt`, a folder, a hub id
            (`BAAI/EVA-CLIP-8B`) or a hub file (`BAAI/EVA-CLIP-8B/EVA_CLIP_8B_psz14_s9B.pt`).
        pretrained: False for random weights.
        device: Where the weights go; `meta` for shapes alone.
        architecture: Other sizes than those of `model`.

    Raises:
        UserError: If the model is unknown, or the weights are missing or of another architecture.
    """
    model, dtype = config.model or "", DTYPES[config.precision]
    if architecture is None:
        one_of("towers.*.model", model, ARCHITECTURES)
        architecture = ARCHITECTURES[model]
    trunk, logit_scale = architecture.build(dtype), None
    if device != "meta" and pretrained:
        source = str(config.pretrained)
        tensors = rename(read(weight_files(source, wanted), wanted), NAMES, dtype, device)
        for name in BATCHED:
            if name in tensors:
                tensors[name] = tensors[name].reshape(1, -1, tensors[name].shape[-1])
        logit_scale = tensors.pop("logit_scale", None)
        assign(trunk, tensors, source, model)
    elif device != "meta":
        _randomise(trunk.to_empty(device=device))
    label = str(config.pretrained).rstrip("/").split("/")[-1] if pretrained else "random"
    precision = "" if config.precision == "fp32" else f", {config.precision}"
    return EvaClipTower(trunk, config, f"eva_clip:{model}/{label}{precision}", logit_scale)


def _randomise(trunk: VisionTransformer) -> None:
    """Fill in place: matrices and embeddings normal, norms one, biases zero."""
    for name, parameter in trunk.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=RANDOM_STD)
