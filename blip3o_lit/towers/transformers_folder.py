"""What a folder of transformers holds: configuration, preprocessing and weights, read without code.

Only what transformers itself has is built: code that a repository brings is never run, a kernel of
the hub is code too, and pickled weights are not read.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import get_model_config
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.towers.clip_pixels import clip_pixels, clip_pixels_of
from blip3o_lit.towers.refusals import first_line
from blip3o_lit.towers.vit import Pixels
from blip3o_lit.towers.weight_files import HUB_ID

try:
    import transformers
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        CLIPVisionModelWithProjection,
    )
except ImportError as error:
    raise UserError(
        "towers.*.kind=transformers needs a package: pip install 'blip3o-lit[transformers]'"
    ) from error

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("image_size", "patch_size", "hidden_act"),
)
"""What a folder shares with the CLIP of open_clip that it is asked to be."""
ATTENTION = "sdpa"
"""Given always, because a config.json may name a kernel on the hub, which is code."""
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError),
    SafetensorError,
)
"""What transformers raises on a folder that it can't make a model of."""


def read_settings(source: str) -> Any:
    folder = Path(source).expanduser()
    if not folder.is_dir() and (source.startswith(".") or not HUB_ID.fullmatch(source)):
        raise UserError(f"no such file or folder: {source}")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{source} has no config.json: it is no folder of transformers")
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except UNREADABLE as error:
        raise UserError(
            f"{source}: its config.json is not on the hub, or of no model that transformers "
            f"{transformers.__version__} has without code of others: {first_line(error)}"
        ) from error


def read_pixels(source: str, settings: Any) -> Pixels:
    """Read the preprocessing, which a folder may leave out where it is CLIP's."""
    path = Path(source).expanduser()
    try:
        processor = AutoImageProcessor.from_pretrained(
            str(path), trust_remote_code=False, backend="pil"
        )
        # A side of its own shows whether pictures of all shapes end as one square.
        wide = processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"]
    except UNREADABLE as error:
        left_out = path.is_dir() and not (path / "preprocessor_config.json").exists()
        if left_out and settings.model_type in ("clip", "clip_vision_model"):
            size = getattr(settings, "vision_config", settings).image_size
            return clip_pixels(size, size)
        raise UserError(
            f"{source}: its preprocessor_config.json can't be used: {first_line(error)}"
        ) from error
    if wide.ndim != 4 or wide.shape[-1] != wide.shape[-2]:
        raise UserError(
            f"{source}: its preprocessing makes {list(wide.shape[1:])}, no square picture"
        )
    config = json.loads(processor.to_json_string())
    if type(processor).__name__.startswith("CLIPImageProcessor"):
        clip = clip_pixels_of(config)
        if clip is not None:
            return clip
    return _processor_pixels(processor, config, wide.shape[-1])


def _processor_pixels(processor: Any, config: dict[str, Any], size: int) -> Pixels:
    def transform(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"][0].float()

    steps = [name for name in config if name.startswith("do_") or "size" in name]
    facts = {name: config[name] for name in sorted([*steps, "resample"]) if name in config}
    facts |= {"mean": config.get("image_mean"), "std": config.get("image_std"), "size": size}
    return Pixels(size, transform, facts)


def clip_settings(model: str) -> Any:
    """Return the configuration of a CLIP that open_clip has by name (its own ViTs only)."""
    config = get_model_config(model) or {}
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if "patch_size" not in vision or not isinstance(vision["layers"], int):
        raise UserError(f"towers.*.model={model} is no ViT of open_clip, for example ViT-L-14")

    def side(facts: dict[str, Any], heads: int) -> dict[str, Any]:
        return {
            "hidden_size": facts["width"],
            "intermediate_size": int(facts["width"] * facts.get("mlp_ratio", 4)),
            "num_hidden_layers": facts["layers"],
            "num_attention_heads": heads,
            "hidden_act": "quick_gelu" if config.get("quick_gelu") else "gelu",
            "projection_dim": config["embed_dim"],
        }

    vision_config = side(vision, vision["width"] // vision.get("head_width", 64))
    vision_config |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    text_config = side(text, text["heads"])
    text_config |= {
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
    }
    return transformers.CLIPConfig(
        vision_config=vision_config, text_config=text_config, projection_dim=config["embed_dim"]
    )


def check_model(settings: Any, model: str, source: str) -> None:
    """Refuse a folder that has not the shapes of a CLIP by name."""
    expected = clip_settings(model).vision_config
    actual = getattr(settings, "vision_config", settings)
    for key in SHAPES:
        theirs, ours = getattr(actual, key, None), getattr(expected, key)
        if theirs != ours:
            raise UserError(f"{source} is no {model}: its {key} is {theirs}, not {ours}")


def random_network(settings: Any, dtype: torch.dtype, device: str, kind: Any = None) -> Any:
    """Build a network of random weights; on `meta`, of none. `kind` is a class to be taken."""
    settings._attn_implementation = ATTENTION
    kind = kind or _kind(settings)
    try:
        with torch.device(device):
            by_type = hasattr(kind, "from_config")
            network = kind.from_config(settings) if by_type else kind(settings)
    except UNREADABLE as error:
        raise UserError(f"a {settings.model_type} can't be built: {first_line(error)}") from error
    return network.to(dtype)


def _kind(settings: Any) -> Any:
    """Return the class; `AutoModel` alone leaves a vision model's projection out."""
    named = CLIPVisionModelWithProjection.__name__ in (settings.architectures or [])
    alone = settings.model_type == "clip_vision_model"
    return CLIPVisionModelWithProjection if named and alone else AutoModel


def read_network(source: str, settings: Any, dtype: torch.dtype, kind: Any = None) -> Any:
    """Build a network with a folder's weights: all of them, none is left at random numbers."""
    try:
        network, report = (kind or _kind(settings)).from_pretrained(
            str(Path(source).expanduser()),
            config=settings,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation=ATTENTION,
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise UserError(
            f"{source}: its weights can't be read, as model.safetensors of its config.json: "
            f"{first_line(error)}"
        ) from error
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    # A classifier more is harmless, a block more is another network.
    blocks = [key for key in report["unexpected_keys"] if re.search(r"\blayers?\.\d+\.", key)]
    shapes = [str(entry[0]) for entry in report["mismatched_keys"]]
    wrong = sorted([*missing, *blocks, *shapes])
    if wrong:
        raise UserError(f"{source}: not the weights of its config.json: {wrong[0]} does not fit")
    return network
