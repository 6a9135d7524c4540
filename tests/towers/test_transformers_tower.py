"""Towers of transformers: tiny models saved to disk give their own tokens, and nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from open_clip import SimpleTokenizer
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.load import load_tower

VISION = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 20,
}
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
CAPTIONS = ["a red seven", "two dogs on a hill, in the rain"]


def noisy(model: nn.Module) -> Any:
    """Give every parameter a value that its neighbours lack, norms and biases too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def small_clip(act: str = "quick_gelu", eps: float = 1e-5) -> CLIPModel:
    sides = {"hidden_act": act, "layer_norm_eps": eps}
    vision = VISION | sides | {"projection_dim": 20}
    config = CLIPConfig(vision_config=vision, text_config=TEXT | sides, projection_dim=20)
    return noisy(CLIPModel(config))


def folder_config(folder: Path, kind: str = "transformers", **changes: Any) -> TowerConfig:
    return TowerConfig(kind, None, str(folder), **changes)


def block_output(blocks: Any, block: int, run: Any) -> Tensor:
    """What a block returns in a plain forward pass."""
    seen: list[Any] = []
    handle = blocks[block].register_forward_hook(lambda *call: seen.append(call[2]))
    run()
    handle.remove()
    return seen[0][0] if isinstance(seen[0], tuple) else seen[0]


@pytest.mark.parametrize("kind", ["transformers", "huggingface"])
@pytest.mark.parametrize(("act", "eps"), [("quick_gelu", 1e-5), ("gelu", 1e-2)])
def test_a_whole_clip_gives_its_tokens_texts_and_head(
    tmp_path: Path, act: str, eps: float, kind: str
) -> None:
    theirs = small_clip(act, eps)
    theirs.save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path, kind))
    assert tower.info.shape == TokenShape((4, 4), True, 48)
    hidden = theirs.vision_model(PIXELS, output_hidden_states=True)
    assert (tower.tokens(PIXELS) - hidden.last_hidden_state).abs().max() <= 1e-5
    first = load_tower(folder_config(tmp_path, layer=0)).tokens(PIXELS)
    assert (first - hidden.hidden_states[1]).abs().max() <= 1e-5
    assert (first - hidden.last_hidden_state).abs().max() > 0.1
    words = SimpleTokenizer()(CAPTIONS)
    expected = nn.functional.normalize(
        theirs.text_projection(theirs.text_model(words).pooler_output), dim=-1
    )
    texts = tower.encode_text(CAPTIONS)
    assert texts is not None
    assert (texts - expected).abs().max() <= 1e-5
    assert torch.allclose(texts.norm(dim=-1), torch.ones(2), atol=1e-5)
    tensors, facts = tower.heads()
    assert facts == {"norm": "layer", "eps": repr(eps)}
    cls = theirs.visual_projection(hidden.pooler_output)
    norm = nn.functional.layer_norm(
        tower.tokens(PIXELS)[:, 0], (48,), tensors["norm.weight"], tensors["norm.bias"], eps
    )
    assert (norm @ tensors["projection"] - cls).abs().max() <= 1e-4
    assert tensors["logit_scale"] == theirs.logit_scale
    normed = load_tower(folder_config(tmp_path, norm=True)).tokens(PIXELS)
    assert (normed[:, 0] - norm).abs().max() <= 1e-5


FAMILIES: dict[str, tuple[str, dict[str, Any], bool, int, str, str]] = {
    # class, configuration, CLS, registers, where the blocks are, where the final norm is
    "siglip": ("SiglipVision", {}, False, 0, "encoder.layers", "post_layernorm"),
    "dinov2": ("Dinov2", {}, True, 0, "encoder.layer", "layernorm"),
    "registers": (
        *("Dinov2WithRegisters", {"num_register_tokens": 3}, True, 3),
        *("encoder.layer", "layernorm"),
    ),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 3}, True, 3, "model.layer", "norm"),
    "aimv2": ("Aimv2Vision", {}, False, 0, "encoder.layers", "rms_norm"),
    "vit": ("ViT", {}, True, 0, "layers", "layernorm"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_give_the_last_block_before_the_final_norm(
    tmp_path: Path, family: str
) -> None:
    name, changes, cls, registers, blocks, norm = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**VISION, **changes)
    theirs = noisy(getattr(transformers, f"{name}Model")(config))
    theirs.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path))
    assert tower.info.shape == TokenShape((4, 4), cls, 48)
    full = block_output(theirs.get_submodule(blocks), -1, lambda: theirs(pixel_values=PIXELS))
    kept = [*range(cls), *range(cls + registers, full.shape[1])]
    tokens = tower.tokens(PIXELS)
    assert tokens.shape == (2, 16 + cls, 48)
    assert (tokens - full[:, kept]).abs().max() <= 1e-5
    normed = load_tower(folder_config(tmp_path, norm=True)).tokens(PIXELS)
    assert (normed - theirs.get_submodule(norm)(full)[:, kept]).abs().max() <= 1e-5
    assert (normed - tokens).abs().max() > 1e-2
    shapes = load_tower(folder_config(tmp_path), device="meta")
    assert shapes.info == tower.info
    assert tower.encode_text(CAPTIONS) is None
    assert "projection" not in tower.heads()[0]


def test_a_whole_siglip_gives_the_tokens_of_its_vision_side(tmp_path: Path) -> None:
    sides = {"vision_config": VISION, "text_config": TEXT | {"vocab_size": 99}}
    theirs = noisy(transformers.SiglipModel(transformers.SiglipConfig(**sides)))
    theirs.save_pretrained(tmp_path)
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path, precision="bf16"))
    vision = theirs.vision_model
    full = block_output(vision.encoder.layers, -1, lambda: vision(pixel_values=PIXELS))
    found = tower.tokens(PIXELS)
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), full, dim=-1).min() > 0.999
    own = sum(parameter.numel() for parameter in vision.parameters())
    assert sum(parameter.numel() for parameter in tower.parameters()) == own


@pytest.mark.parametrize("spelling", ["plain", "prefixed", "projected"])
def test_a_clip_vision_model_alone_works_under_its_spellings(tmp_path: Path, spelling: str) -> None:
    projected = spelling == "projected"
    kind = transformers.CLIPVisionModelWithProjection if projected else CLIPVisionModel
    theirs = noisy(kind(CLIPVisionConfig(**VISION, projection_dim=20)))
    theirs.save_pretrained(tmp_path)
    if spelling == "prefixed":  # transformers before 5 wrote `vision_model.` before each name
        state = {f"vision_model.{k}": v.contiguous() for k, v in theirs.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    tower = load_tower(folder_config(tmp_path))
    assert (tower.tokens(PIXELS) - theirs(PIXELS).last_hidden_state).abs().max() <= 1e-5
    assert tower.encode_text(CAPTIONS) is None
    wanted = {"norm.weight", "norm.bias"} | ({"projection"} if projected else set())
    assert set(tower.heads()[0]) == wanted


def test_the_folder_may_be_asked_to_be_a_named_model(tmp_path: Path) -> None:
    small_clip().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no ViT-L-14-quickgelu: its hidden_size is 48"):
        load_tower(TowerConfig("transformers", "ViT-L-14-quickgelu", str(tmp_path)))
    with pytest.raises(UserError, match="is no ViT of open_clip"):
        load_tower(TowerConfig("transformers", "coca_ViT-L-15"), pretrained=False)
    meta = load_tower(
        TowerConfig("transformers", "ViT-L-14-quickgelu", "openai/clip-vit-large-patch14"),
        device="meta",
    )
    assert (meta.info.shape.tokens, meta.info.shape.width) == (257, 1024)
    assert meta.info.name == "huggingface:clip-vit-large-patch14"
    random = load_tower(folder_config(tmp_path), pretrained=False)
    assert random.info.name.endswith("/random")
    again = load_tower(folder_config(tmp_path), pretrained=False)
    assert torch.equal(random.tokens(PIXELS), again.tokens(PIXELS))


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_no_folder_of_a_vit_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(words: str, source: Any = tmp_path) -> None:
        with pytest.raises(UserError, match=words) as error:
            load_tower(folder_config(source))
        assert "\n" not in str(error.value)

    refused("no config.json")
    refused("no such file or folder", tmp_path / "absent")
    refused("not on the hub", "some-org/some-model")
    (tmp_path / "config.json").write_text("{")
    refused("config.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nothing_known"}))
    refused("nothing_known")
    SiglipImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refused("can't be read|no ViT")
    config = transformers.ResNetConfig(depths=[1], hidden_sizes=[8])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    refused("ResNetModel does not support")
    with pytest.raises(UserError, match="a resnet can't be built"):
        load_tower(folder_config(tmp_path), pretrained=False)


def test_weights_that_do_not_fit_or_are_pickled_are_refused(tmp_path: Path) -> None:
    theirs = small_clip()
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for changes in ({"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"intermediate_size": 90}):
        rewrite(tmp_path / "config.json", vision_config=settings["vision_config"] | changes)
        with pytest.raises(UserError, match="weights") as error:
            load_tower(folder_config(tmp_path))
        assert "\n" not in str(error.value)
    rewrite(tmp_path / "config.json", **settings)
    (tmp_path / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_tower(folder_config(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="can't be read"):
        load_tower(folder_config(tmp_path))


@pytest.mark.parametrize("part", ["config.json", "preprocessor_config.json"])
def test_code_in_a_folder_is_never_run(tmp_path: Path, part: str) -> None:
    small_clip().save_pretrained(tmp_path)
    CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size=56).save_pretrained(tmp_path)
    marker = tmp_path / "marker"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass A: pass\n")
    names = ("AutoConfig", "AutoModel", "AutoImageProcessor")
    mapped = {name: "code.A" for name in names}
    kinds = {"model_type": "mine", "image_processor_type": "Mine", "processor_class": "Mine"}
    rewrite(tmp_path / part, auto_map=mapped, **kinds)
    with pytest.raises(UserError) as error:
        load_tower(folder_config(tmp_path))
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_clips_preprocessing_is_transformers_own(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(getattr(data, name)())
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size=56, image_std=[0.2] * 3)
    small_clip().save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path))
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert (tower.preprocess(image) - expected).abs().max() <= 1e-5
    assert (tower.preprocess(image.convert("RGBA")) - expected).abs().max() <= 1e-5
    assert tower.info.preprocessing["std"] == [0.2] * 3
    assert tower.info.preprocessing["shortest"] == 60  # the facts of towers/clip_pixels.py


def test_other_preprocessing_is_the_folders_or_refused(tmp_path: Path) -> None:
    small_clip().save_pretrained(tmp_path)
    image = Image.fromarray(data.coffee())
    theirs = SiglipImageProcessorPil(size={"height": 56, "width": 56}, resample=2)
    theirs.save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path))
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(tower.preprocess(image), expected)
    assert tower.info.preprocessing["mean"] == [0.5] * 3
    json.dumps(tower.info.preprocessing)
    CLIPImageProcessorPil(do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no square"):
        load_tower(folder_config(tmp_path))
    CLIPImageProcessorPil(crop_size=224).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't take the 224x224 px"):
        load_tower(folder_config(tmp_path))


def test_without_transformers_one_line_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from blip3o_lit.config.towers import TowerConfig\n"
        "from blip3o_lit.towers.load import load_tower\n"
        "try: load_tower(TowerConfig('transformers', 'ViT-L-14', 'a/b'), device='meta')\n"
        "except ValueError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == [
        "towers.*.kind=transformers needs a package: pip install 'blip3o-lit[transformers]'"
    ]
