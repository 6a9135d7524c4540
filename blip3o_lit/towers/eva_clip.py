"""EVA-CLIP-8B's image tower (Sun et al. 2024, arXiv:2402.04252), without remote code.

A pre-norm ViT: a plain GELU MLP of ratio 5, RMSNorm, learned absolute positions, CLS; no bias on
query, key and value; the head is an RMSNorm and a projection without bias. Sizes:
EVA-CLIP-18B/shinji/eva_clip/model_configs/EVA-CLIP-8B.json of github.com/baaivision/EVA. timm's
VisionTransformer is this network. The text tower is not built: the condition needs none, and the
target's captions come from its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from timm.layers.norm import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from blip3o_lit.config.errors import one_of
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.clip_pixels import clip_pixels
from blip3o_lit.towers.eva_clip_weights import rename, wanted
from blip3o_lit.towers.head import DTYPES, TowerHead
from blip3o_lit.towers.timm_tower import TimmTower
from blip3o_lit.towers.weight_files import assign, read, weight_files

EPSILON = 1e-6
RANDOM_STD = 0.02
"""Standard deviation of random matrices; the published initialisation's (truncated) normal."""


@dataclass(frozen=True)
class EvaClipArchitecture:
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


def load_eva_clip(
    config: TowerConfig,
    pretrained: bool,
    device: str,
    architecture: EvaClipArchitecture | None = None,
) -> TimmTower:
    """Build an EVA-CLIP tower; its weights are cast on the way in, so memory holds them once.

    Args:
        config: `model` names the architecture; `pretrained` is a `.pt`, a folder, a hub id
            (`BAAI/EVA-CLIP-8B`) or a hub file (`BAAI/EVA-CLIP-8B/EVA_CLIP_8B_psz14_s9B.pt`).
        pretrained: False for random weights.
        device: Where the weights go; `meta` for shapes alone.
        architecture: Other sizes than those of `model`.
    """
    model, dtype = config.model or "", DTYPES[config.precision]
    if architecture is None:
        one_of("towers.*.model", model, ARCHITECTURES)
        architecture = ARCHITECTURES[model]
    trunk, logit_scale = architecture.build(dtype), None
    if device != "meta" and pretrained:
        source = str(config.pretrained)
        tensors = rename(read(weight_files(source, wanted), wanted), dtype, device)
        logit_scale = tensors.pop("logit_scale", None)
        assign(trunk, tensors, source, model)
    elif device != "meta":
        _randomise(trunk.to_empty(device=device))
    label = str(config.pretrained).rstrip("/").split("/")[-1] if pretrained else "random"
    head = TowerHead(trunk.norm, trunk.head.weight.T, logit_scale)
    pixels = clip_pixels(architecture.image_size, architecture.image_size)
    return TimmTower(trunk, config, f"eva_clip:{model}/{label}", head, pixels)


def _randomise(trunk: VisionTransformer) -> None:
    for name, parameter in trunk.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=RANDOM_STD)
