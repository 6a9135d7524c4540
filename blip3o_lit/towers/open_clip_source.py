"""Which open_clip model, weights, preprocessing and activation a configuration means.

Two traps of open_clip are closed here. A checkpoint FILE silently gets the default mean and size
rule, whatever it was trained with: we take them from the pretrained tag `like`, from an
`open_clip_config.json` beside the file, or from the model's tags where all agree, and else refuse.
And the plain `ViT-L-14` runs OpenAI's weights with the wrong GELU: we set the tag's own.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
from open_clip.factory import HF_HUB_PREFIX, LOCAL_DIR_PREFIX, get_model_config
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.refusals import unknown_model, unknown_weights

FOLDER_CONFIG = "open_clip_config.json"
PIXEL_KEYS = ("mean", "std", "interpolation", "resize_mode")


@dataclass(frozen=True)
class Source:
    """What `open_clip.create_model` is to be called with."""

    model: str
    """Architecture, `local-dir:FOLDER` or `hf-hub:org/name`."""
    label: str
    """Model and weights, for the token index; no local path."""
    weights: str | None = None
    """Tag or file; None where the model brings its own, or where weights are random."""
    pixels: dict[str, Any] | None = None
    """Preprocessing that overrides open_clip's default; None keeps the folder's own."""
    quick_gelu: bool = False
    """Whether the activation is x sigmoid(1.702 x), as in OpenAI's models."""


def find_source(config: TowerConfig, pretrained: bool) -> Source:
    """Resolve a configuration; for random weights nothing is required of `config.pretrained`."""
    model, weights = config.model or "", config.pretrained
    if model.startswith(LOCAL_DIR_PREFIX):
        return _folder(Path(model.removeprefix(LOCAL_DIR_PREFIX)), pretrained)
    if model.startswith(HF_HUB_PREFIX):
        name = model.removeprefix(HF_HUB_PREFIX)
        if Path(name).expanduser().is_dir() or name.startswith(("/", ".", "~")):
            raise UserError(f"towers.*.model={model}: for a folder write local-dir:{name}")
        return Source(model, name if pretrained else f"{name}/random")
    model = model.replace("/", "-")
    if get_model_config(model) is None:
        raise unknown_model(model, "open_clip", open_clip.list_models())
    tags = list_pretrained_tags_by_model(model)
    if weights and weights not in tags and pretrained:
        return _local(config, model, Path(weights).expanduser(), tags)
    tag = config.like or (weights if weights in tags else None)
    quick, pixels = _recipe(model, tag) if tag else (_is_quick(model), None)
    label = f"{_named(model, quick)}/{weights if pretrained and weights else 'random'}"
    return Source(model, label, weights if pretrained else None, pixels, quick)


def _folder(path: Path, pretrained: bool) -> Source:
    path = path.expanduser()
    config = path / FOLDER_CONFIG
    if not config.is_file():
        is_transformers = (path / "config.json").is_file()
        hint = ": it is a transformers folder, set towers.*.kind=transformers"
        raise UserError(f"{path} has no {FOLDER_CONFIG}{hint if is_transformers else ''}")
    if "model_cfg" not in json.loads(config.read_text()):
        raise UserError(f"{config} has no model_cfg")
    label = path.name if pretrained else f"{path.name}/random"
    return Source(f"{LOCAL_DIR_PREFIX}{path}", label)


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
        raise unknown_weights(config.pretrained, model, tags)
    quick, pixels = _recipe_of_file(config, model, path, tags)
    if _is_quick(model) and not quick:
        raise UserError(f"{path.name} was not trained with quick GELU: choose a model without it")
    return Source(model, f"{_named(model, quick)}/{path.name}", str(path), pixels, quick)


def _recipe_of_file(
    config: TowerConfig, model: str, path: Path, tags: list[str]
) -> tuple[bool, dict[str, Any] | None]:
    """Return the activation and preprocessing that a checkpoint file was trained with."""
    if config.like:
        return _recipe(model, config.like)
    beside = path.parent / FOLDER_CONFIG
    if beside.is_file():
        facts = json.loads(beside.read_text())
        quick = bool(facts.get("model_cfg", {}).get("quick_gelu", False))
        return quick, facts.get("preprocess_cfg", {})
    recipes = [_recipe(model, tag) for tag in tags]
    if any(recipe != recipes[0] for recipe in recipes):
        raise UserError(
            f"{path.name}: its preprocessing is unknown, and the tags of {model} differ in it: "
            f"set towers.*.like to the tag that it was trained like, one of {', '.join(tags)}"
        )
    return recipes[0] if recipes else (_is_quick(model), None)


def _recipe(model: str, tag: str) -> tuple[bool, dict[str, Any]]:
    """Return a tag's activation and preprocessing; -quickgelu in a name asks for such a tag."""
    base = model.removesuffix("-quickgelu")
    config = get_pretrained_cfg(model, tag) or get_pretrained_cfg(base, tag)
    if not config:
        raise UserError(
            f"towers.*.like={tag} is no tag of {model}: choose from "
            f"{', '.join(list_pretrained_tags_by_model(base))}"
        )
    pixels = {key: config[key] for key in PIXEL_KEYS if key in config}
    return bool(config.get("quick_gelu", False)), pixels


def _is_quick(model: str) -> bool:
    return bool((get_model_config(model) or {}).get("quick_gelu", False))


def _named(model: str, quick: bool) -> str:
    return f"{model}-quickgelu" if quick and not model.endswith("-quickgelu") else model
