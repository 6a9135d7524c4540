"""CLIP folders against transformers' own models, and its own image processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from open_clip import SimpleTokenizer
from PIL import Image
from skimage import data
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.clip_folder import ClipFolder
from blip3o_lit.towers.huggingface_tower import NAMES, ClipParts
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.renaming import rename

VISION = {
    "hidden_size": 48,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 20,
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


def noisy(model: nn.Module) -> nn.Module:
    """Give every parameter a value that its neighbours lack, norms and biases too."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


def small_clip(act: str = "quick_gelu", eps: float = 1e-5) -> CLIPModel:
    sides = {"hidden_act": act, "layer_norm_eps": eps}
    config = CLIPConfig(vision_config=VISION | sides, text_config=TEXT | sides, projection_dim=20)
    return noisy(CLIPModel(config))  # type: ignore[return-value]


def folder_config(folder: Path, **changes: object) -> TowerConfig:
    return TowerConfig("huggingface", None, str(folder), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(("act", "eps"), [("quick_gelu", 1e-5), ("gelu", 1e-2)])
def test_a_whole_clip_gives_transformers_tokens_and_texts(
    tmp_path: Path, act: str, eps: float
) -> None:
    theirs = small_clip(act, eps)
    theirs.save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path))
    hidden = theirs.vision_model(PIXELS, output_hidden_states=True)
    assert (tower.tokens(PIXELS) - hidden.last_hidden_state).abs().max() <= 1e-4
    first = load_tower(folder_config(tmp_path, layer=0)).tokens(PIXELS)
    assert (first - hidden.hidden_states[1]).abs().max() <= 1e-4
    words = SimpleTokenizer()(CAPTIONS)
    expected = nn.functional.normalize(
        theirs.text_projection(theirs.text_model(words).pooler_output), dim=-1
    )
    found = tower.encode_text(CAPTIONS)
    assert found is not None
    assert (found - expected).abs().max() <= 1e-4
    assert torch.allclose(found.norm(dim=-1), torch.ones(2), atol=1e-5)
    tensors, facts = tower.heads()
    assert facts == {"norm": "layer", "eps": repr(eps)}
    cls = theirs.visual_projection(hidden.pooler_output)
    norm = nn.functional.layer_norm(
        tower.tokens(PIXELS)[:, 0], (48,), tensors["norm.weight"], tensors["norm.bias"], eps
    )
    assert (norm @ tensors["projection"] - cls).abs().max() <= 1e-4
    assert tensors["logit_scale"] == theirs.logit_scale


@pytest.mark.parametrize("prefixed", [True, False])
def test_a_vision_model_alone_works_under_both_spellings(tmp_path: Path, prefixed: bool) -> None:
    theirs = noisy(CLIPVisionModel(CLIPVisionConfig(**VISION)))
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    if prefixed:  # transformers before 5 wrote `vision_model.` before each name
        (tmp_path / "model.safetensors").unlink()
        state = {f"vision_model.{k}": v for k, v in theirs.state_dict().items()}
        state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
        torch.save(state, tmp_path / "pytorch_model.bin")
    tower = load_tower(folder_config(tmp_path))
    assert (tower.tokens(PIXELS) - theirs(PIXELS).last_hidden_state).abs().max() <= 1e-4
    assert tower.encode_text(CAPTIONS) is None
    assert set(tower.heads()[0]) == {"norm.weight", "norm.bias"}


def test_a_full_vit_l_14_agrees() -> None:
    """The mission's target tower at full size, 304 M parameters, random weights."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    }
    with torch.device("meta"):
        theirs = CLIPVisionModel(CLIPVisionConfig(**sizes))
        ours = ClipParts(ClipFolder.from_open_clip("ViT-L-14-quickgelu"), projected=False)
    rng = torch.Generator().manual_seed(0)
    pool = 0.03 * torch.randn(5_000_000, generator=rng)  # drawing all 304 M would take seconds
    theirs.to_empty(device="cpu").eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        start = int(torch.randint(len(pool) - parameter.numel(), (1,), generator=rng))
        parameter.copy_(pool[start : start + parameter.numel()].view_as(parameter))
        if name.endswith("weight") and "norm" in name.replace("layrnorm", "norm"):
            parameter.add_(1)
    embeddings = theirs.embeddings
    embeddings.position_ids = torch.arange(257)[None]
    renamed = rename(theirs.state_dict().items(), NAMES, torch.float32, "cpu")
    visual = ours.visual
    visual.load_state_dict({k.removeprefix("visual."): v for k, v in renamed.items()}, assign=True)
    tokens = []
    visual.transformer.resblocks[-1].register_forward_hook(lambda *call: tokens.append(call[2]))
    pixels = torch.randn(1, 3, 224, 224, generator=rng)
    with torch.inference_mode():
        visual.eval()(pixels)
        expected = theirs(pixels).last_hidden_state
    assert expected.shape == (1, 257, 1024)
    assert (tokens[0] - expected).abs().max() <= 1e-4


def test_the_folder_may_be_asked_to_be_a_named_model(tmp_path: Path) -> None:
    small_clip().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no ViT-L-14-quickgelu: its hidden_size is 48"):
        load_tower(TowerConfig("huggingface", "ViT-L-14-quickgelu", str(tmp_path)))
    meta = load_tower(
        TowerConfig("huggingface", "ViT-L-14-quickgelu", "openai/clip-vit-large-patch14"),
        device="meta",
    )
    assert (meta.info.shape.tokens, meta.info.shape.width) == (257, 1024)
    assert meta.info.name == "huggingface:clip-vit-large-patch14"
    random = load_tower(folder_config(tmp_path), pretrained=False)
    assert random.info.name.endswith("/random")
    again = load_tower(folder_config(tmp_path), pretrained=False)
    assert torch.equal(random.tokens(PIXELS), again.tokens(PIXELS))


def test_what_is_no_clip_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        load_tower(folder_config(tmp_path))
    with pytest.raises(UserError, match="no such file or folder"):
        load_tower(folder_config(tmp_path / "absent"))
    with pytest.raises(UserError, match="hub"):
        load_tower(TowerConfig("huggingface", None, "some-org/some-model"))
    config = {"model_type": "siglip", "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="is a siglip, not a CLIP"):
        load_tower(folder_config(tmp_path))
    small_clip().save_pretrained(tmp_path)
    wrong = json.loads((tmp_path / "config.json").read_text())
    wrong["vision_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="not the weights"):
        load_tower(folder_config(tmp_path))


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_preprocessing_is_transformers_own(tmp_path: Path, name: str) -> None:
    image = Image.fromarray(getattr(data, name)())
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 60}, crop_size=56, image_std=[0.2] * 3)
    small_clip().save_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path)
    tower = load_tower(folder_config(tmp_path))
    expected = theirs(image, return_tensors="pt")["pixel_values"][0]
    assert (tower.preprocess(image) - expected).abs().max() <= 1e-5
    assert (tower.preprocess(image.convert("RGBA")) - expected).abs().max() <= 1e-5
    assert tower.info.preprocessing["std"] == [0.2] * 3


def test_other_preprocessing_is_refused(tmp_path: Path) -> None:
    small_clip().save_pretrained(tmp_path)
    CLIPImageProcessorPil(do_center_crop=False).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not CLIP's preprocessing"):
        load_tower(folder_config(tmp_path))
    CLIPImageProcessorPil(crop_size=224).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="takes 56 px, but its preprocessing makes 224"):
        load_tower(folder_config(tmp_path))
