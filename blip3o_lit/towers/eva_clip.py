"""EVA-CLIP-8B's image tower (Sun et al. 2024, arXiv:2402.04252), without remote code.

A pre-norm ViT: a plain GELU MLP of ratio 5, RMSNorm, learned absolute positions, CLS; no bias on
query, key and value; the head is an RMSNorm and a projection without bias. Sizes:
EVA-CLIP-18B/shinji/eva_clip/model_configs/EVA-CLIP-8B.json of github.com/baaivision/EVA. timm's
VisionTransformer is this network. The text tower is not built: the condition needs none, and the
target's captions come from its own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from timm.layers.norm import RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

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


PUBLISHED: dict[str, Any] = {
    "img_size": 224,
    "patch_size": 14,
    "embed_dim": 4096,
    "depth": 32,
    "num_heads": 32,
    "mlp_ratio": 5.0,
    "num_classes": 1280,
}
ARCHITECTURES = {"EVA-CLIP-8B": PUBLISHED, "EVA-CLIP-8B-448": PUBLISHED | {"img_size": 448}}
"""Sizes of the pre-norm models in timm's words; the projection stands in the classifier's place.

The 448 px one is called 8B-plus in the original files.
"""


def load_eva_clip(
    config: TowerConfig,
    pretrained: bool,
    device: str,
    architectures: Mapping[str, dict[str, Any]] = ARCHITECTURES,
) -> TimmTower:
    """Build an EVA-CLIP tower; its weights are cast on the way in, so memory holds them once."""
    model, dtype = config.model or "", DTYPES[config.precision]
    one_of("towers.*.model", model, architectures)
    sizes = architectures[model]
    trunk, logit_scale = _without_weights(sizes, dtype), None
    if device != "meta" and pretrained:
        source = str(config.pretrained)
        tensors = rename(read(weight_files(source, wanted), wanted), dtype, device)
        logit_scale = tensors.pop("logit_scale", None)
        assign(trunk, tensors, source, model)
    elif device != "meta":
        _randomise(trunk.to_empty(device=device))
    label = str(config.pretrained).rstrip("/").split("/")[-1] if pretrained else "random"
    head = TowerHead(trunk.norm, cast(Tensor, trunk.head.weight).T, logit_scale)
    pixels = clip_pixels(sizes["img_size"], sizes["img_size"])
    return TimmTower(trunk, config, f"eva_clip:{model}/{label}", head, pixels)


def _without_weights(sizes: dict[str, Any], dtype: torch.dtype) -> VisionTransformer:
    trunk = VisionTransformer(
        **sizes,
        global_pool="token",
        qkv_bias=False,
        norm_layer=partial(RmsNorm, eps=EPSILON),
        weight_init="skip",
        device="meta",
        dtype=dtype,
    )
    width, projection = sizes["embed_dim"], sizes["num_classes"]
    trunk.head = nn.Linear(width, projection, bias=False, device="meta", dtype=dtype)
    return trunk


def _randomise(trunk: VisionTransformer) -> None:
    for name, parameter in trunk.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=RANDOM_STD)
