"""What a folder of transformers holds: configuration, preprocessing and weights, read without code.

Only what transformers itself has is built: code that a repository brings is never run, a kernel of
the hub is code too, and pickled weights are not read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.factory import get_model_config
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.towers.clip_pixels import ClipPixels
from blip3o_lit.towers.weight_files import HUB_ID, first_line

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
CLIP_TYPES = ("clip", "clip_vision_model")
ATTENTION = "sdpa"
"""Given always, because a config.json may name a kernel on the hub, which is code."""
UNREADABLE = (
    *(OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError),
    SafetensorError,
)
"""What transformers raises on a folder that it can't make a model of."""


@dataclass(frozen=True)
class AnyPixels:
    """A picture through an image processor of transformers."""

    processor: Any
    size: int

    def __call__(self, image: Image.Image) -> Tensor:
        """Return `[3, S, S]` float32."""
        given = self.processor(images=image.convert("RGB"), return_tensors="pt")
        return given["pixel_values"][0].float()

    def describe(self) -> dict[str, Any]:
        """Return the facts that go into the token index."""
        given = json.loads(self.processor.to_json_string())
        names = [name for name in given if name.startswith("do_") or "size" in name]
        facts = {name: given[name] for name in sorted([*names, "resample"]) if name in given}
        means = {"mean": given.get("image_mean"), "std": given.get("image_std")}
        return {**facts, **means, "size": self.size}


def read_settings(source: str) -> Any:
    """Read config.json.

    Raises:
        UserError: If there is none, or it is of a model that transformers lacks.
    """
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


def read_pixels(source: str, settings: Any) -> Any:
    """Return the preprocessing: `ClipPixels` where it is CLIP's, which a folder may leave out.

    Raises:
        UserError: If it can't be read, or makes anything but squares.
    """
    path = Path(source).expanduser()
    try:
        processor = AutoImageProcessor.from_pretrained(
            str(path), trust_remote_code=False, backend="pil"
        )
        # A side of its own shows whether pictures of all shapes end as one square.
        wide = processor(images=Image.new("RGB", (96, 64)), return_tensors="pt")["pixel_values"]
    except UNREADABLE as error:
        named = not path.is_dir() or (path / "preprocessor_config.json").exists()
        if settings.model_type in CLIP_TYPES and not named:
            size = getattr(settings, "vision_config", settings).image_size
            return ClipPixels(size, size)
        raise UserError(
            f"{source}: its preprocessor_config.json can't be used: {first_line(error)}"
        ) from error
    if wide.ndim != 4 or wide.shape[-1] != wide.shape[-2]:
        raise UserError(
            f"{source}: its preprocessing makes {list(wide.shape[1:])}, no square picture"
        )
    given = json.loads(processor.to_json_string())
    if type(processor).__name__.startswith("CLIPImageProcessor") and ClipPixels.can(given):
        return ClipPixels.of(given)
    return AnyPixels(processor, wide.shape[-1])


def clip_settings(model: str) -> Any:
    """Return the configuration of a CLIP that open_clip has by name (its own ViTs only).

    Raises:
        UserError: If open_clip has no such model, or it is no plain ViT.
    """
    config = get_model_config(model) or {}
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if "patch_size" not in vision or not isinstance(vision["layers"], int):
        raise UserError(f"towers.*.model={model} is no ViT of open_clip, for example ViT-L-14")
    act = "quick_gelu" if config.get("quick_gelu") else "gelu"
    sides = [
        {
            "hidden_size": side["width"],
            "intermediate_size": int(side["width"] * side.get("mlp_ratio", 4)),
            "num_hidden_layers": side["layers"],
            "num_attention_heads": heads,
            "hidden_act": act,
            "projection_dim": config["embed_dim"],
        }
        for side, heads in (
            (vision, vision["width"] // vision.get("head_width", 64)),
            (text, text["heads"]),
        )
    ]
    sides[0] |= {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
    sides[1] |= {
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
    }
    return transformers.CLIPConfig(
        vision_config=sides[0], text_config=sides[1], projection_dim=config["embed_dim"]
    )


def check_model(settings: Any, model: str, source: str) -> None:
    """Refuse a folder that has not the shapes of a CLIP by name.

    Raises:
        UserError: Naming the first that differs.
    """
    wanted = clip_settings(model).vision_config
    given = getattr(settings, "vision_config", settings)
    for key in SHAPES:
        if getattr(given, key, None) != getattr(wanted, key):
            raise UserError(
                f"{source} is no {model}: its {key} is {getattr(given, key, None)}, "
                f"not {getattr(wanted, key)}"
            )


def random_network(settings: Any, dtype: torch.dtype, device: str) -> Any:
    """Build a network of random weights; on `meta`, of none.

    Raises:
        UserError: If transformers can't build it.
    """
    settings._attn_implementation = ATTENTION
    kind = _kind(settings)
    try:
        with torch.device(device):
            network = kind.from_config(settings) if kind is AutoModel else kind(settings)
    except UNREADABLE as error:
        raise UserError(f"a {settings.model_type} can't be built: {first_line(error)}") from error
    return network.to(dtype)


def _kind(settings: Any) -> Any:
    """Return the class; `AutoModel` alone leaves a vision model's projection out."""
    named = CLIPVisionModelWithProjection.__name__ in (settings.architectures or [])
    alone = settings.model_type == "clip_vision_model"
    return CLIPVisionModelWithProjection if named and alone else AutoModel


def read_network(source: str, settings: Any, dtype: torch.dtype) -> Any:
    """Build a network with a folder's weights: all of them, none is left at random numbers.

    Raises:
        UserError: If they can't be read, or are of another network.
    """
    folder = Path(source).expanduser()
    try:
        network, report = _kind(settings).from_pretrained(
            str(folder),
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
