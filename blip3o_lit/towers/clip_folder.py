"""What `config.json` of a CLIP folder says, or open_clip of an architecture by name."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from open_clip.factory import get_model_config
from open_clip.transformer import QuickGELU
from torch import nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.towers.weight_files import find

CLIP_BPE_WORDS = 49408
"""Size of CLIP's vocabulary; a text tower with another one has another tokenizer."""
MODEL_TYPES = ("clip", "clip_vision_model")
ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
"""What a `vision_config` leaves out (transformers' CLIPVisionConfig); text_config differs below."""
TEXT_DEFAULTS = DEFAULTS | {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": CLIP_BPE_WORDS,
    "max_position_embeddings": 77,
}


@dataclass(frozen=True)
class ClipFolder:
    """What `config.json` says."""

    vision: dict[str, Any]
    text: dict[str, Any] | None
    """None without a text tower, or with one of another vocabulary."""
    projection: int

    @classmethod
    def from_source(cls, source: str) -> ClipFolder:
        """Read `config.json` of a folder or hub repository.

        Raises:
            UserError: If there is none, or it is not of a CLIP.
        """
        path = find(source, "config.json")
        if path is None:
            raise UserError(f"{source} has no config.json, or the hub cannot be reached")
        config = json.loads(path.read_text())
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise UserError(f"{source} is a {kind}, not a CLIP: only {', '.join(MODEL_TYPES)} work")
        given = config if kind == "clip_vision_model" else config.get("vision_config", {})
        vision = {key: given.get(key, value) for key, value in DEFAULTS.items()}
        text = None
        if kind == "clip":
            given = config.get("text_config", {})
            text = {key: given.get(key, value) for key, value in TEXT_DEFAULTS.items()}
            text = text if text["vocab_size"] == CLIP_BPE_WORDS else None
        projection = config.get("projection_dim", vision["projection_dim"])
        unknown = vision["hidden_act"] not in ACTIVATIONS
        if unknown or (text and text["hidden_act"] != vision["hidden_act"]):
            raise UserError(f"{source}: hidden_act must be {' or '.join(ACTIVATIONS)} throughout")
        return cls(vision, text, projection)

    @classmethod
    def from_open_clip(cls, model: str) -> ClipFolder:
        """Read the shapes of a named open_clip architecture (its own ViTs only).

        Raises:
            UserError: If open_clip has no such model, or it is no plain ViT.
        """
        config = get_model_config(model)
        vision = (config or {}).get("vision_cfg", {})
        if config is None or "patch_size" not in vision or not isinstance(vision["layers"], int):
            raise UserError(f"towers.*.model={model} is no ViT of open_clip, for example ViT-L-14")
        text, act = config["text_cfg"], "quick_gelu" if config.get("quick_gelu") else "gelu"
        shared = {"hidden_act": act, "layer_norm_eps": 1e-5, "projection_dim": config["embed_dim"]}
        sides = [
            {
                "hidden_size": side["width"],
                "intermediate_size": int(side["width"] * side.get("mlp_ratio", 4)),
                "num_hidden_layers": side["layers"],
                "num_attention_heads": heads,
            }
            for side, heads in (
                (vision, vision["width"] // vision.get("head_width", 64)),
                (text, text["heads"]),
            )
        ]
        pixels = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
        length = text["context_length"]
        words = {"vocab_size": text["vocab_size"], "max_position_embeddings": length}
        return cls(sides[0] | shared | pixels, sides[1] | shared | words, config["embed_dim"])
