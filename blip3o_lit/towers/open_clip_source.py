"""Which open_clip model, weights, preprocessing and activation a configuration means."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, get_model_config
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from blip3o_lit.config.errors import UserError, nearest
from blip3o_lit.config.towers import TowerConfig

FOLDER_CONFIG = "open_clip_config.json"
PIXEL_KEYS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Source:
    """What `open_clip.create_model` is to be called with."""

    model: str
    """Architecture, `local-dir:FOLDER` or `hf-hub:org/name`."""
    weights: str | None
    """Tag or file; None where the model brings its own, or where weights are random."""
    pixels: dict[str, Any] | None
    """Preprocessing that overrides open_clip's default; None keeps the folder's own."""
    quick_gelu: bool
    """Whether the activation is x sigmoid(1.702 x), as in OpenAI's models."""
    label: str
    """Model and weights, for the token index; no local path."""


def find_source(config: TowerConfig, pretrained: bool) -> Source:
    """Resolve a configuration of kind=open_clip.

    Args:
        config: The tower.
        pretrained: False for random weights: then nothing is required of `config.pretrained`.

    Raises:
        UserError: If the model or its weights are unknown, or a file's preprocessing is.
    """
    model, weights = config.model or "", config.pretrained
    if model.startswith(LOCAL_DIR_PREFIX):
        return _folder(Path(model.removeprefix(LOCAL_DIR_PREFIX)), pretrained)
    if model.startswith(HF_HUB_PREFIX):
        name = model.removeprefix(HF_HUB_PREFIX)
        if Path(name).expanduser().is_dir() or name.startswith(("/", ".", "~")):
            raise UserError(f"towers.*.model={model}: for a folder write local-dir:{name}")
        return Source(model, None, None, False, name if pretrained else f"{name}/random")
    model = model.replace("/", "-")
    if get_model_config(model) is None:
        guess = nearest(model, open_clip.list_models())
        hint = f"did you mean towers.*.model={guess}? " if guess else ""
        raise UserError(f"towers.*.model={model} is no open_clip model: {hint}".rstrip())
    tags = list_pretrained_tags_by_model(model)
    if weights and weights not in tags and pretrained:
        return _local(config, model, Path(weights).expanduser(), tags)
    tag = config.like or (weights if weights in tags else None)
    quick, pixels = _recipe(model, tag) if tag else (_is_quick(model), None)
    label = f"{_named(model, quick)}/{weights if pretrained and weights else 'random'}"
    return Source(model, weights if pretrained else None, pixels, quick, label)


def _local(config: TowerConfig, model: str, path: Path, tags: list[str]) -> Source:
    """Resolve a local file or folder that is to be an architecture's weights."""
    if path.is_dir():
        source = _folder(path, True)
        theirs, ours = get_model_config(source.model), get_model_config(model)
        if theirs is None or ours is None or theirs["vision_cfg"] != ours["vision_cfg"]:
            raise UserError(
                f"{path} is not a {model}: set towers.*.model=local-dir:{path} to take its own "
                "architecture"
            )
        return source
    if not path.is_file():
        guess = nearest(str(config.pretrained), tags)
        hint = f"did you mean {guess}? " if guess else ""
        raise UserError(
            f"towers.*.pretrained={config.pretrained} is neither a file nor a tag of {model}: "
            f"{hint}tags are {', '.join(tags) or 'none'}"
        )
    if config.like:
        quick, pixels = _recipe(model, config.like)
    elif (path.parent / FOLDER_CONFIG).is_file():
        beside = json.loads((path.parent / FOLDER_CONFIG).read_text())
        quick = bool(beside.get("model_cfg", {}).get("quick_gelu", False))
        pixels = beside.get("preprocess_cfg", {})
    else:
        recipes = [_recipe(model, tag) for tag in tags]
        if any(recipe != recipes[0] for recipe in recipes):
            raise UserError(
                f"{path.name}: its preprocessing is unknown, and the tags of {model} differ in it: "
                f"set towers.*.like to the tag that it was trained like, one of {', '.join(tags)}"
            )
        quick, pixels = recipes[0] if recipes else (_is_quick(model), None)
    if _is_quick(model) and not quick:
        raise UserError(f"{path.name} was not trained with quick GELU: choose a model without it")
    return Source(model, str(path), pixels, quick, f"{_named(model, quick)}/{path.name}")


def _folder(path: Path, pretrained: bool) -> Source:
    path = path.expanduser()
    config = path / FOLDER_CONFIG
    if not config.is_file():
        hint = (
            ": it is a transformers folder, set towers.*.kind=transformers"
            if (path / "config.json").is_file()
            else ""
        )
        raise UserError(f"{path} has no {FOLDER_CONFIG}{hint}")
    if "model_cfg" not in json.loads(config.read_text()):
        raise UserError(f"{config} has no model_cfg")
    label = path.name if pretrained else f"{path.name}/random"
    return Source(f"{LOCAL_DIR_PREFIX}{path}", None, None, False, label)


def _recipe(model: str, tag: str) -> tuple[bool, dict[str, Any]]:
    """Return a tag's activation and preprocessing; -quickgelu in a name asks for such a tag."""
    base = model.removesuffix("-quickgelu")
    config = get_pretrained_cfg(model, tag) or get_pretrained_cfg(base, tag)
    if not config:
        raise UserError(
            f"towers.*.like={tag} is no tag of {model}: choose from "
            f"{', '.join(list_pretrained_tags_by_model(base))}"
        )
    return bool(config.get("quick_gelu", False)), {
        key: config[key] for key in PIXEL_KEYS if key in config
    }


def _is_quick(model: str) -> bool:
    return bool((get_model_config(model) or {}).get("quick_gelu", False))


def _named(model: str, quick: bool) -> str:
    return f"{model}-quickgelu" if quick and not model.endswith("-quickgelu") else model
