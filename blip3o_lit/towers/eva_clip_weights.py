"""Names of the public EVA-CLIP weights -> names of timm's VisionTransformer, which runs them.

Two public schemes exist. The original `.pt` (github.com/baaivision/EVA, EVA-CLIP-18B/shinji) calls
the image tower `visual.*`; below that prefix its names are timm's already. The Hugging Face
repositories (BAAI/EVA-CLIP-8B) use CLIP's names, with query, key and value apart.
"""

from __future__ import annotations

from blip3o_lit.towers.renaming import rules

_HF = r"vision_model\."
_LAYER = _HF + r"encoder\.layers\.(\d+)\."
NAMES = rules(
    {
        r"visual\.(.+)": r"\1",
        _HF + r"embeddings\.class_embedding": "cls_token",
        _HF + r"embeddings\.position_embedding\.weight": "pos_embed",
        _HF + r"embeddings\.patch_embedding\.(\w+)": r"patch_embed.proj.\1",
        _LAYER + r"layer_norm([12])\.(\w+)": r"blocks.\1.norm\2.\3",
        _LAYER + r"self_attn\.([qkv])_proj\.(\w+)": r"blocks.\1.attn.qkv.{\2}\3",
        _LAYER + r"self_attn\.out_proj\.(\w+)": r"blocks.\1.attn.proj.\2",
        _LAYER + r"mlp\.fc([12])\.(\w+)": r"blocks.\1.mlp.fc\2.\3",
        _HF + r"post_layernorm\.(\w+)": r"norm.\1",
        r"visual_projection\.(\w+)": r"head.\1",
    }
)
BATCHED = ("cls_token", "pos_embed")
"""timm keeps a leading dimension of 1 on these; the Hugging Face files do not."""


def wanted(name: str) -> bool:
    """Say whether a published tensor belongs to the image tower."""
    ours = name.startswith(("visual.", "vision_model.", "visual_projection."))
    return (ours or name == "logit_scale") and not name.endswith("position_ids")
