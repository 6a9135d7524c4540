"""CLIP folders as transformers saves them, run by open_clip's transformer without transformers.

`config.json` and `model.safetensors` (or `pytorch_model.bin`, or shards with an index), from a
local folder or the hub: a whole CLIPModel or its vision model alone. The activation, the norms'
epsilon and `preprocessor_config.json` are the folder's own. This is what both seeds' CLIP tokens
were made with (`openai/clip-vit-large-patch14`).

Shape suffixes: B images, N tokens (CLS first), C token width, P projection width, S side.
"""

from __future__ import annotations

from typing import Any

import torch
from open_clip import SimpleTokenizer
from open_clip.transformer import LayerNorm, TextTransformer, VisionTransformer
from PIL import Image
from torch import Tensor, nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.shape import TokenShape
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.clip_folder import ACTIVATIONS, ClipFolder
from blip3o_lit.towers.clip_pixels import ClipPixels
from blip3o_lit.towers.head import DTYPES
from blip3o_lit.towers.open_clip_tower import native_head, native_tokens
from blip3o_lit.towers.renaming import rename, rules
from blip3o_lit.towers.timm_tower import block_index
from blip3o_lit.towers.tower import Tower, TowerInfo
from blip3o_lit.towers.weight_files import assign, find, read, weight_files

_LAYERS = {
    r"{0}encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)": r"{1}transformer.resblocks.\1.ln_\2.\3",
    r"{0}encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(\w+)": (
        r"{1}transformer.resblocks.\1.attn.in_proj_{{\2}}\3"
    ),
    r"{0}encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)": (
        r"{1}transformer.resblocks.\1.attn.out_proj.\2"
    ),
    r"{0}encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)": r"{1}transformer.resblocks.\1.mlp.c_fc.\2",
    r"{0}encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)": r"{1}transformer.resblocks.\1.mlp.c_proj.\2",
}
_VISION, _TEXT = r"(?:vision_model\.)?", r"text_model\."
NAMES = rules(
    {
        old.replace("{0}", prefix): new.replace("{1}", side).replace("{{", "{").replace("}}", "}")
        for prefix, side in ((_VISION, "visual."), (_TEXT, "text."))
        for old, new in _LAYERS.items()
    }
    | {
        rf"{_VISION}embeddings\.class_embedding": "visual.class_embedding",
        rf"{_VISION}embeddings\.patch_embedding\.weight": "visual.conv1.weight",
        rf"{_VISION}embeddings\.position_embedding\.weight": "visual.positional_embedding",
        rf"{_VISION}pre_layrnorm\.(\w+)": r"visual.ln_pre.\1",
        rf"{_VISION}post_layernorm\.(\w+)": r"visual.ln_post.\1",
        r"visual_projection\.weight": "visual.proj",
        rf"{_TEXT}embeddings\.token_embedding\.weight": "text.token_embedding.weight",
        rf"{_TEXT}embeddings\.position_embedding\.weight": "text.positional_embedding",
        rf"{_TEXT}final_layer_norm\.(\w+)": r"text.ln_final.\1",
        r"text_projection\.weight": "text.text_projection",
    }
)
"""Names in a transformers folder -> in open_clip; `pre_layrnorm` is the published spelling."""
TRANSPOSED = ("visual.proj", "text.text_projection")


class ClipParts(nn.Module):
    """open_clip's vision transformer and, where the folder has one, text transformer."""

    def __init__(self, folder: ClipFolder, projected: bool = True) -> None:
        """Build with random weights; `projected=False` leaves the vision projection out."""
        super().__init__()
        vision, text = folder.vision, folder.text
        activation = ACTIVATIONS[vision["hidden_act"]]
        self.visual = VisionTransformer(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            layers=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
            output_dim=folder.projection,
            act_layer=activation,
            norm_layer=LayerNorm,
        )
        if not projected:
            self.visual.proj = None
        self.text = self.logit_scale = None
        if text is not None:
            self.text = TextTransformer(
                context_length=text["max_position_embeddings"],
                vocab_size=text["vocab_size"],
                width=text["hidden_size"],
                layers=text["num_hidden_layers"],
                heads=text["num_attention_heads"],
                mlp_ratio=text["intermediate_size"] / text["hidden_size"],
                output_dim=folder.projection,
                pool_type="argmax",
                act_layer=activation,
                norm_layer=LayerNorm,
            )
            self.logit_scale = nn.Parameter(torch.tensor(2.6592))
        for side, config in ((self.visual, vision), (self.text, text or vision)):
            for module in side.modules() if side is not None else ():
                if isinstance(module, nn.LayerNorm):
                    module.eps = config["layer_norm_eps"]


class HuggingfaceTower(Tower):
    """A CLIP of a transformers folder."""

    def __init__(self, model: Any, config: TowerConfig, name: str, pixels: ClipPixels) -> None:
        """Read the model's facts and cast it to the configured precision."""
        super().__init__()
        visual = model.visual
        size = visual.image_size[0]
        if pixels.size != size:
            raise UserError(f"{name} takes {size} px, but its preprocessing makes {pixels.size}")
        self.info = TowerInfo(
            name=name,
            shape=TokenShape(tuple(visual.grid_size), True, visual.conv1.out_channels),
            layer=config.layer,
            normed=config.norm,
            image_size=size,
            preprocessing=pixels.describe(),
        )
        self._pixels = pixels
        self._block = block_index(config.layer, len(visual.transformer.resblocks), name)
        self._tokenizer = SimpleTokenizer() if model.text is not None else None
        self.head = native_head(visual, model.logit_scale)
        self.dtype = DTYPES[config.precision]
        self.model = model.to(self.dtype)

    def preprocess(self, image: Image.Image) -> Tensor:
        """Apply the folder's preprocessing; returns `[3, S, S]` float32."""
        return self._pixels(image)

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the block's output `[B, N, C]`, which is `last_hidden_state` for layer=-1."""
        tokens_BNC = native_tokens(self.model.visual, images_B3SS.to(self.dtype), self._block)
        return self.head.normalise(tokens_BNC) if self.info.normed else tokens_BNC

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the final LayerNorm, and projection and logit scale where the folder has them."""
        return self.head.describe(self.info.normed)

    @torch.inference_mode()
    def encode_text(self, captions: list[str]) -> Tensor | None:
        """Return unit-norm caption embeddings `[B, P]` float32; None for a vision model alone."""
        if self.model.text is None or self._tokenizer is None:
            return None
        words_BL = self._tokenizer(captions).to(self.device)
        return nn.functional.normalize(self.model.text(words_BL).float(), dim=-1)


def load_huggingface(config: TowerConfig, pretrained: bool, device: str) -> HuggingfaceTower:
    """Build a tower from a transformers CLIP folder.

    Args:
        config: `pretrained` is a folder or a hub id; `model`, where set, an open_clip architecture
            that it must have, and whose shapes random weights take.
        pretrained: False for random weights.
        device: Where the weights go; `meta` for shapes alone.

    Raises:
        UserError: If the folder is missing, is no CLIP or does not fit.
    """
    source, model = config.pretrained, config.model
    if not model and not source:
        raise UserError("a tower of kind=huggingface needs towers.*.pretrained=FOLDER or a hub id")
    read_folder = source is not None and (pretrained or not model)
    if model and (not read_folder or device == "meta"):
        folder, read_folder = ClipFolder.from_open_clip(model), False
    else:
        folder = ClipFolder.from_source(str(source))
    if read_folder and model:
        _check_model(folder, model, str(source))
    pixel_file = find(str(source), "preprocessor_config.json") if read_folder else None
    size = folder.vision["image_size"]
    pixels = ClipPixels.from_file(pixel_file) if pixel_file else ClipPixels(size, size)
    if pretrained and device != "meta":
        parts = _with_weights(folder, str(source), device, DTYPES[config.precision])
    else:
        with torch.device(device):
            parts = ClipParts(folder)
    label = str(source).rstrip("/").split("/")[-1] if source else ""
    label = f"{model or label}/random" if not pretrained else label
    precision = "" if config.precision == "fp32" else f", {config.precision}"
    return HuggingfaceTower(parts, config, f"huggingface:{label}{precision}", pixels)


def _check_model(folder: ClipFolder, model: str, source: str) -> None:
    wanted = ClipFolder.from_open_clip(model).vision
    for key, value in wanted.items():
        if folder.vision[key] != value and key != "projection_dim":
            raise UserError(
                f"{source} is no {model}: its {key} is {folder.vision[key]}, not {value}"
            )


def _with_weights(folder: ClipFolder, source: str, device: str, dtype: torch.dtype) -> ClipParts:
    """Build on the meta device and give the parts their weights, in their final precision."""

    def wanted(name: str) -> bool:
        text = name.startswith("text_") or name == "logit_scale"
        return not name.endswith("position_ids") and (folder.text is not None or not text)

    tensors = rename(read(weight_files(source, wanted), wanted), NAMES, dtype, device)
    for name in TRANSPOSED:
        if name in tensors:
            tensors[name] = tensors[name].T.contiguous()
    with torch.device("meta"):
        parts: Any = ClipParts(folder, projected="visual.proj" in tensors)
    assign(parts, tensors, source, "the CLIP of its config.json")
    if parts.text is not None and parts.text.attn_mask is not None:
        parts.text.attn_mask = parts.text.build_causal_mask().to(device)
    return parts
