"""The towers group: options compose, values are checked, nothing heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig, TowersConfig
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.tower import tower_cost

CONF = ROOT / "conf"
GROUPS = sorted(path.stem for path in (CONF / "towers").glob("*.yaml"))


def towers(*overrides: str) -> TowersConfig:
    """Compose the group as a command does and merge it into the dataclass."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found = compose(overrides=["+towers=" + overrides[0], *overrides[1:]])
    merged = OmegaConf.merge(OmegaConf.structured(TowersConfig), found.towers)
    result: Any = OmegaConf.to_object(merged)
    return result


def test_every_option_is_there() -> None:
    named = ["demo", "eva02l_clipl14", "eva02l_dinov2b", "eva8b_clipl14", "siglip2_clipl14"]
    assert [*named, "text_clipl14"] == GROUPS


@pytest.mark.parametrize(
    ("name", "condition", "target"),
    [
        ("demo", (True, 192), (True, 128)),
        ("eva8b_clipl14", (True, 4096), (True, 1024)),
        ("eva02l_clipl14", (True, 1024), (True, 1024)),
        ("eva02l_dinov2b", (True, 1024), (True, 768)),
        ("siglip2_clipl14", (False, 1024), (True, 1024)),
        ("text_clipl14", (True, 1024), (True, 1024)),
    ],
)
def test_every_pair_has_a_16x16_grid(
    name: str, condition: tuple[bool, int], target: tuple[bool, int]
) -> None:
    pair = towers(name)
    for config, (cls, width) in ((pair.condition, condition), (pair.target, target)):
        shape = load_tower(config, device="meta").info.shape
        assert (shape.grid, shape.cls, shape.width) == ((16, 16), cls, width)


def test_overrides_compose() -> None:
    pair = towers(
        "eva8b_clipl14", "towers.target.pretrained=/some/folder", "towers.pretrained=false"
    )
    assert pair.target.pretrained == "/some/folder"
    assert pair.target.model == "ViT-L-14-quickgelu"
    assert not pair.pretrained
    assert pair.condition.pretrained == "BAAI/EVA-CLIP-8B"
    # random weights: the folder need not exist
    tower = load_tower(pair.target, pretrained=pair.pretrained, device="meta")
    assert tower.info.name == "huggingface:ViT-L-14-quickgelu/random, fp16"
    assert towers("demo") == TowersConfig()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "opn_clip"}, "kind=opn_clip.*kind=open_clip"),
        ({"kind": "timm", "precision": "fp8"}, "precision=fp8"),
        ({"kind": "timm", "like": "openai"}, "like=openai is for kind=open_clip"),
        ({"kind": "eva_clip", "image_size": 336}, "image_size=336"),
        ({"kind": "timm", "image_size": 0}, "must be above 0"),
        ({"kind": "demo", "layer": 2}, "demo towers have"),
    ],
)
def test_wrong_values_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        TowerConfig(**changes)


@pytest.mark.parametrize("kind", ["open_clip", "timm", "eva_clip"])
def test_a_tower_needs_a_model(kind: str) -> None:
    with pytest.raises(UserError, match="set towers.*model"):
        load_tower(TowerConfig(kind))
    with pytest.raises(UserError, match="FOLDER"):
        load_tower(TowerConfig("huggingface"))


def test_the_configuration_imports_nothing_heavy() -> None:
    code = "import sys, blip3o_lit.config.towers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=CONF.parent).returncode == 0


def test_cost_is_that_of_the_closed_form() -> None:
    """One image of ViT-B/16: 12 blocks of N (24 C^2) + 4 N^2 C, and the patch embedding."""
    config = TowerConfig("open_clip", "ViT-B-16", "openai", precision="fp16")
    cost = tower_cost(load_tower(config, device="meta"))
    n, c = 197, 768
    blocks = 12 * (24 * n * c**2 + 4 * n**2 * c)
    assert cost.flops == blocks + 2 * 196 * c * 3 * 16**2
    assert cost.parameters == 149_620_737  # the model card's 149.6 M, text side included
    assert cost.bytes == 2 * cost.parameters
