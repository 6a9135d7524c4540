"""open_clip towers: its own outputs, its two traps, files, folders and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.open_clip_source import find_source

VISION = {"image_size": 56, "layers": 3, "width": 48, "head_width": 12, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
SMALL = {"embed_dim": 20, "vision_cfg": VISION, "text_cfg": TEXT}
TIMM_VISION = {"timm_model_name": "vit_pwee_patch16_reg1_gap_256", "image_size": 64}
INCEPTION = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def folder(path: Path, model: dict[str, Any] = SMALL, pixels: dict[str, Any] = INCEPTION) -> str:
    """Write an open_clip folder with random weights; returns the word for `model`."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": model, "preprocess_cfg": pixels | {"resize_mode": "squash"}}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    word = f"local-dir:{path}"
    built = open_clip.create_model(word, load_weights=False, pretrained_text=False)
    save_file(built.state_dict(), path / "open_clip_model.safetensors")
    return word


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small architecture in open_clip's own registry, as a user may add one."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-small-test", SMALL)
    return "ViT-small-test"


def block_outputs(blocks: nn.Module, forward: Any, pixels: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    handles = [b.register_forward_hook(lambda *call: seen.append(call[2])) for b in blocks]
    forward(pixels)
    for handle in handles:
        handle.remove()
    return seen


def test_tokens_and_texts_are_open_clips_own(tmp_path: Path) -> None:
    word = folder(tmp_path)
    theirs = open_clip.create_model(word).eval()
    expected = block_outputs(theirs.visual.transformer.resblocks, theirs.visual, PIXELS)
    for layer in (-1, 0, 1):
        found = load_tower(TowerConfig("open_clip", word, layer=layer)).tokens(PIXELS)
        assert found.shape == (2, 17, 48)
        assert (found - expected[layer]).abs().max() <= 1e-4
    random = load_tower(TowerConfig("open_clip", word), pretrained=False).tokens(PIXELS)
    assert (random - expected[-1]).abs().max() > 1e-2
    captions = ["a red seven", "two dogs"]
    tower = load_tower(TowerConfig("open_clip", word))
    words = open_clip.get_tokenizer(word)(captions)
    text = theirs.encode_text(words, normalize=True)
    found = tower.encode_text(captions)
    assert found is not None
    assert (found - text).abs().max() <= 1e-4
    assert torch.allclose(found.norm(dim=-1), torch.ones(2), atol=1e-5)
    tensors, facts = tower.heads()
    last = expected[-1][:, 0]
    normed = nn.functional.layer_norm(
        last, (48,), tensors["norm.weight"], tensors["norm.bias"], float(facts["eps"])
    )
    assert (normed @ tensors["projection"] - theirs.encode_image(PIXELS)).abs().max() <= 1e-4
    whole = theirs.visual.ln_post(expected[-1])
    normed_tower = load_tower(TowerConfig("open_clip", word, norm=True))
    assert (normed_tower.tokens(PIXELS) - whole).abs().max() <= 1e-4


def test_a_timm_trunk_without_cls(tmp_path: Path) -> None:
    vision = TIMM_VISION | {"timm_pool": "avg", "timm_proj": "linear"}
    word = folder(tmp_path, SMALL | {"vision_cfg": vision})
    tower = load_tower(TowerConfig("open_clip", word))
    assert not tower.info.shape.cls
    assert tower.info.shape.grid == (16, 16)  # a folder may have its trunk's own 256 px
    theirs = open_clip.create_model(word).eval()
    trunk = theirs.visual.trunk
    pixels = torch.randn(1, 3, 256, 256)
    expected = block_outputs(trunk.blocks, trunk, pixels)[-1][:, trunk.num_prefix_tokens :]
    assert (tower.tokens(pixels) - expected).abs().max() <= 1e-4


def test_preprocessing_is_the_checkpoints_own(tmp_path: Path) -> None:
    word = folder(tmp_path)
    tower = load_tower(TowerConfig("open_clip", word))
    _, theirs = open_clip.create_model_from_pretrained(word)
    for photograph in (data.coffee(), data.chelsea()):
        image = Image.fromarray(photograph)
        assert torch.equal(tower.preprocess(image), theirs(image))
    assert tower.info.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert tower.info.preprocessing["resize"] == "squash"
    assert tower.info.image_size == 56


def test_a_file_does_not_silently_get_the_default_mean(tmp_path: Path, registered: str) -> None:
    folder(tmp_path / "made")
    file = tmp_path / "made" / "open_clip_model.safetensors"
    config = TowerConfig("open_clip", registered, str(file))
    beside = load_tower(config)  # the folder's open_clip_config.json tells
    assert beside.info.preprocessing["mean"] == [0.5, 0.5, 0.5]
    assert str(tmp_path) not in beside.info.name
    # tags of ViT-L-14 differ in mean and activation: refused, until `like` names one
    file.rename(tmp_path / "w.safetensors")
    plain = TowerConfig("open_clip", "ViT-L-14", str(tmp_path / "w.safetensors"))
    with pytest.raises(UserError, match="set towers.*like"):
        find_source(plain, True)
    plain.like = "openai"
    source = find_source(plain, True)
    assert source.quick_gelu
    assert source.pixels is not None
    assert source.pixels["mean"] == open_clip.OPENAI_DATASET_MEAN
    plain.like = "laion2b_s32b_b82k"
    source = find_source(plain, True)
    assert not source.quick_gelu
    assert source.pixels is not None
    assert source.pixels["mean"] == (0.5, 0.5, 0.5)
    plain.like = "laion"
    with pytest.raises(UserError, match="like=laion is no tag"):
        find_source(plain, True)
    # all of SigLIP's tags agree, so nothing need be said
    siglip = TowerConfig("open_clip", "ViT-B-16-SigLIP", str(tmp_path / "w.safetensors"))
    pixels = find_source(siglip, True).pixels
    assert pixels is not None
    assert (pixels["mean"], pixels["resize_mode"]) == ((0.5, 0.5, 0.5), "squash")


@pytest.mark.parametrize(
    ("model", "tag", "quick"),
    [
        ("ViT-B-32", "openai", True),
        ("ViT-B-32-quickgelu", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ],
)
def test_the_activation_is_the_tags(model: str, tag: str, quick: bool) -> None:
    config = TowerConfig("open_clip", model, tag)
    tower = load_tower(config, pretrained=False, device="meta")
    assert any(isinstance(module, QuickGELU) for module in tower.modules()) is quick
    assert ("quickgelu" in tower.info.name) is quick


def test_siglip_has_no_cls_and_no_projection() -> None:
    config = TowerConfig("open_clip", "ViT-L-16-SigLIP2-256", "webli")
    tower = load_tower(config, pretrained=False, device="meta")
    assert (tower.info.shape.cls, tower.info.shape.grid) == (False, (16, 16))
    assert tower.info.preprocessing["mean"] == [0.5, 0.5, 0.5]
    with torch.device("meta"):
        assert tower.tokens(torch.zeros(1, 3, 256, 256)).shape == (1, 256, 1024)
    assert "projection" not in tower.heads()[0]


def test_random_weights_repeat_and_leave_the_callers_generator_alone(registered: str) -> None:
    config = TowerConfig("open_clip", registered)
    torch.manual_seed(11)
    first = load_tower(config, pretrained=False).tokens(PIXELS)
    drawn = torch.rand(1)
    torch.manual_seed(11)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(load_tower(config).tokens(PIXELS), first)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(registered: str, precision: str) -> None:
    half = load_tower(TowerConfig("open_clip", registered, precision=precision))
    tokens = half.tokens(PIXELS)
    assert tokens.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    exact = load_tower(TowerConfig("open_clip", registered)).tokens(PIXELS)
    assert torch.cosine_similarity(tokens.float(), exact, dim=-1).min() > 0.999
    text = half.encode_text(["a cat"])
    assert text is not None
    assert text.dtype == torch.float32
    assert text.norm().item() == pytest.approx(1, abs=1e-3)
    assert half.heads()[0]["projection"].dtype == torch.float32


def test_another_input_size(registered: str) -> None:
    tower = load_tower(TowerConfig("open_clip", registered, image_size=70))
    assert tower.info.shape.grid == (5, 5)
    assert tower.preprocess(Image.fromarray(data.coffee())).shape == (3, 70, 70)
    assert tower.tokens(torch.zeros(1, 3, 70, 70)).shape == (1, 26, 48)


def test_what_does_not_exist_or_fit_is_refused(tmp_path: Path, registered: str) -> None:
    def refused(words: str, model: str, weights: str | None = None) -> None:
        with pytest.raises(UserError, match=words):
            load_tower(TowerConfig("open_clip", model, weights))

    refused("did you mean towers.*ViT-L-14", "ViT-L-14x")
    refused("did you mean laion2b_s34b_b79k", "ViT-B-32", "laion2b_s34b_b79")
    refused("neither a file nor a tag", "ViT-B-32", str(tmp_path / "absent.pt"))
    refused("write local-dir:", f"hf-hub:{tmp_path}")
    refused("has no open_clip_config.json", f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{}")
    refused("kind=transformers", f"local-dir:{tmp_path}")
    refused("is no ViT", "RN50")
    refused("could not be loaded", "ViT-B-32", "openai")  # the hub is off in tests
    other = tmp_path / "other"
    folder(other, SMALL | {"vision_cfg": VISION | {"width": 60}})
    refused("not the weights of", registered, str(other / "open_clip_model.safetensors"))
    refused("set towers.*model=local-dir", registered, str(other))
    folder(tmp_path / "same")
    same = load_tower(TowerConfig("open_clip", registered, str(tmp_path / "same")))
    assert same.info.name == "open_clip:same"
