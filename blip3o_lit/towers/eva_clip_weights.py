"""Names of the public EVA-CLIP weights -> names of timm's VisionTransformer, which runs them.

Two public schemes exist. The original `.pt` (github.com/baaivision/EVA, EVA-CLIP-18B/shinji) calls
the image tower `visual.*`; below that prefix its names are timm's already. The Hugging Face
repositories (BAAI/EVA-CLIP-8B) use CLIP's names, with query, key and value apart.
"""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError

_HF = r"vision_model\."
_LAYER = _HF + r"encoder\.layers\.(\d+)\."
NAMES = {
    r"visual\.(.+)": r"\1",
    _HF + r"embeddings\.class_embedding": "cls_token",
    _HF + r"embeddings\.position_embedding\.weight": "pos_embed",
    _HF + r"embeddings\.patch_embedding\.(\w+)": r"patch_embed.proj.\1",
    _LAYER + r"layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
    _LAYER + r"self_attn\.(?P<third>[qkv])_proj\.(\w+)": r"blocks.\1.attn.qkv.\3",
    _LAYER + r"self_attn\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
    _LAYER + r"mlp\.fc([12])\.(\w+)": r"blocks.\1.mlp.fc\2.\3",
    _HF + r"post_layernorm\.(\w+)": r"norm.\1",
    r"visual_projection\.(\w+)": r"head.\1",
}
"""Published names as regular expressions; a `third` is a part of one fused tensor."""
BATCHED = ("cls_token", "pos_embed")
"""timm keeps a leading dimension of 1 on these; the Hugging Face files do not."""


def wanted(name: str) -> bool:
    """Say whether a published tensor belongs to the image tower."""
    ours = name.startswith(("visual.", "vision_model.", "visual_projection."))
    return (ours or name == "logit_scale") and not name.endswith("position_ids")


def rename(
    tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: str
) -> dict[str, Tensor]:
    """Rename, fuse and cast tensors; of the published ones, memory holds one at a time.

    Unknown names stay, so that loading names them.
    """
    renamed: dict[str, Tensor] = {}
    thirds: dict[str, str] = {}
    for published, tensor in tensors:
        name, third = _new_name(published)
        if name in BATCHED:
            tensor = tensor.reshape(1, -1, tensor.shape[-1])
        if not third:
            renamed[name] = tensor.to(device=device, dtype=dtype)
            continue
        rows = len(tensor)
        if name not in renamed:
            renamed[name] = torch.empty(3 * rows, *tensor.shape[1:], dtype=dtype, device=device)
        first = "qkv".index(third) * rows
        renamed[name][first : first + rows] = tensor
        thirds[name] = thirds.get(name, "") + third
    for name, there in thirds.items():
        missing = ", ".join(third for third in "kqv" if third not in there)
        if missing:
            raise UserError(f"the weights lack {missing} of {name}: not this architecture")
    return renamed


def _new_name(name: str) -> tuple[str, str]:
    """Return timm's name, and which third of its tensor this is (an empty string: all of it)."""
    for pattern, replacement in NAMES.items():
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement), match.groupdict().get("third", "")
    return name, ""
