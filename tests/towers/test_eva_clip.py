"""EVA-CLIP against a plain reference written from the published architecture, in both schemes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.eva_clip import ARCHITECTURES, load_eva_clip
from blip3o_lit.towers.load import load_tower

WIDTH, DEPTH, HEADS, PROJECTION = 48, 3, 4, 24
SMALL = {
    "img_size": 42,
    "patch_size": 14,
    "embed_dim": WIDTH,
    "depth": DEPTH,
    "num_heads": HEADS,
    "mlp_ratio": 5.0,
    "num_classes": PROJECTION,
}
LAYERS = "vision_model.encoder.layers"


def published(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of the Hugging Face repository."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng) * 0.2

    c, mlp = WIDTH, 5 * WIDTH
    tensors = {
        "vision_model.embeddings.class_embedding": draw(c),
        "vision_model.embeddings.patch_embedding.weight": draw(c, 3, 14, 14),
        "vision_model.embeddings.patch_embedding.bias": draw(c),
        "vision_model.embeddings.position_embedding.weight": draw(10, c),
        "vision_model.post_layernorm.weight": 1 + draw(c),
        "visual_projection.weight": draw(PROJECTION, c),
    }
    for i in range(DEPTH):
        tensors |= {f"{LAYERS}.{i}.self_attn.{p}_proj.weight": draw(c, c) for p in "qkv"}
        tensors |= {
            f"{LAYERS}.{i}.self_attn.out_proj.weight": draw(c, c),
            f"{LAYERS}.{i}.self_attn.out_proj.bias": draw(c),
            f"{LAYERS}.{i}.layer_norm1.weight": 1 + draw(c),
            f"{LAYERS}.{i}.layer_norm2.weight": 1 + draw(c),
            f"{LAYERS}.{i}.mlp.fc1.weight": draw(mlp, c),
            f"{LAYERS}.{i}.mlp.fc1.bias": draw(mlp),
            f"{LAYERS}.{i}.mlp.fc2.weight": draw(c, mlp),
            f"{LAYERS}.{i}.mlp.fc2.bias": draw(c),
        }
    return tensors


def original(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the names of the original `.pt`."""
    vision = "vision_model.embeddings"
    tensors = {
        "visual.cls_token": hf[f"{vision}.class_embedding"][None, None],
        "visual.pos_embed": hf[f"{vision}.position_embedding.weight"][None],
        "visual.patch_embed.proj.weight": hf[f"{vision}.patch_embedding.weight"],
        "visual.patch_embed.proj.bias": hf[f"{vision}.patch_embedding.bias"],
        "visual.norm.weight": hf["vision_model.post_layernorm.weight"],
        "visual.head.weight": hf["visual_projection.weight"],
        "logit_scale": torch.tensor(4.6),
        "text.token_embedding.weight": torch.zeros(4, 4),
    }
    for i in range(DEPTH):
        old, new = f"{LAYERS}.{i}", f"visual.blocks.{i}"
        qkv = [hf[f"{old}.self_attn.{p}_proj.weight"] for p in "qkv"]
        tensors[f"{new}.attn.qkv.weight"] = torch.cat(qkv)
        for theirs, ours in (("self_attn.out_proj", "attn.proj"), ("mlp.fc1", "mlp.fc1")):
            tensors[f"{new}.{ours}.weight"] = hf[f"{old}.{theirs}.weight"]
            tensors[f"{new}.{ours}.bias"] = hf[f"{old}.{theirs}.bias"]
        tensors[f"{new}.mlp.fc2.weight"] = hf[f"{old}.mlp.fc2.weight"]
        tensors[f"{new}.mlp.fc2.bias"] = hf[f"{old}.mlp.fc2.bias"]
        tensors[f"{new}.norm1.weight"] = hf[f"{old}.layer_norm1.weight"]
        tensors[f"{new}.norm2.weight"] = hf[f"{old}.layer_norm2.weight"]
    return tensors


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def reference(w: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """Each block's output by explicit sums and softmax, in fp64."""
    w, pixels = {name: value.double() for name, value in w.items()}, pixels.double()
    b, heads, k = len(pixels), HEADS, WIDTH // HEADS
    pre = "vision_model.embeddings"
    patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)  # [B, 3, 3, 3, 14, 14]
    x = torch.einsum("bcyxij,ocij->byxo", patches, w[f"{pre}.patch_embedding.weight"])
    x = (x + w[f"{pre}.patch_embedding.bias"]).reshape(b, 9, -1)
    x = torch.cat([w[f"{pre}.class_embedding"].expand(b, 1, -1), x], 1)
    x = x + w[f"{pre}.position_embedding.weight"]
    outputs = []
    for i in range(DEPTH):
        at = f"{LAYERS}.{i}"
        h = rms(x, w[f"{at}.layer_norm1.weight"])
        q, key, v = (
            (h @ w[f"{at}.self_attn.{p}_proj.weight"].T).reshape(b, 10, heads, k) for p in "qkv"
        )
        weights = (torch.einsum("bqhk,bnhk->bhqn", q, key) / math.sqrt(k)).softmax(-1)
        h = torch.einsum("bhqn,bnhk->bqhk", weights, v).reshape(b, 10, -1)
        x = x + h @ w[f"{at}.self_attn.out_proj.weight"].T + w[f"{at}.self_attn.out_proj.bias"]
        h = rms(x, w[f"{at}.layer_norm2.weight"])
        h = gelu(h @ w[f"{at}.mlp.fc1.weight"].T + w[f"{at}.mlp.fc1.bias"])
        x = x + h @ w[f"{at}.mlp.fc2.weight"].T + w[f"{at}.mlp.fc2.bias"]
        outputs.append(x)
    return outputs


PIXELS = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(1))


def small(source: Path | str, pretrained: bool = True, **changes: Any) -> Any:
    config = TowerConfig("eva_clip", "small", str(source), **changes)
    tower = load_eva_clip(config, pretrained, "cpu", {"small": SMALL})
    return tower.eval().requires_grad_(False)


def write_shards(folder: Path, tensors: dict[str, Tensor], suffix: str) -> None:
    """Two shards that tear one layer's query and key apart, and a third of text alone."""
    index = "model.safetensors.index.json"
    index = index if suffix == "safetensors" else "pytorch_model.bin.index.json"
    names = sorted(tensors)
    parts = [names[::2], names[1::2], ["text_model.final_layer_norm.weight"]]
    places = {}
    for i, part in enumerate(parts):
        file = f"weights-{i + 1:05d}-of-00003.{suffix}"
        places |= dict.fromkeys(part, file)
        content = {name: tensors[name].contiguous() for name in part if name in tensors}
        if i == 2:
            continue  # never read: it holds nothing of the image tower
        if suffix == "safetensors":
            save_file(content, folder / file)
        else:
            torch.save(content, folder / file)
    (folder / index).write_text(json.dumps({"weight_map": places}))


@pytest.fixture(params=["one", "shards", "bins", "pt", "wrapped"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    hf = published()
    if request.param == "one":
        save_file(hf, tmp_path / "model.safetensors")
    elif request.param == "shards":
        write_shards(tmp_path, hf, "safetensors")
    elif request.param == "bins":
        write_shards(tmp_path, hf, "bin")
    elif request.param == "pt":
        torch.save(original(hf), tmp_path / "eva.pt")
        return tmp_path / "eva.pt"
    else:
        named = {f"module.{name}": tensor for name, tensor in original(hf).items()}
        torch.save({"state_dict": named, "epoch": 3}, tmp_path / "eva.pt")
        return tmp_path / "eva.pt"
    return tmp_path


def test_every_published_form_gives_the_references_tokens(source: Path) -> None:
    expected = reference(published(), PIXELS)
    for layer in (-1, 0, 1):
        found = small(source, layer=layer).tokens(PIXELS)
        assert found.shape == (2, 10, 48)
        assert (found - expected[layer]).abs().max() <= 1e-4


def test_final_norm_and_projection_are_the_published_ones(tmp_path: Path) -> None:
    hf = published()
    torch.save(original(hf), tmp_path / "eva.pt")
    tensors, facts = small(tmp_path / "eva.pt").heads()
    assert facts == {"norm": "rms", "eps": "1e-06"}
    assert set(tensors) == {"norm.weight", "projection", "logit_scale"}
    assert tensors["logit_scale"].item() == pytest.approx(4.6)
    last = reference(hf, PIXELS)[-1]
    normed = rms(last, hf["vision_model.post_layernorm.weight"].double())
    found = small(tmp_path / "eva.pt", norm=True)
    assert found.info.normed
    assert (found.tokens(PIXELS) - normed).abs().max() <= 1e-4
    embedding = normed @ hf["visual_projection.weight"].T.double()
    ours = rms(small(tmp_path / "eva.pt").tokens(PIXELS), tensors["norm.weight"])
    assert (ours @ tensors["projection"] - embedding).abs().max() <= 1e-4


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_are_held_in_the_configured_precision(tmp_path: Path, precision: str) -> None:
    save_file(published(), tmp_path / "model.safetensors")
    tower = small(tmp_path, precision=precision)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert {parameter.dtype for parameter in tower.parameters()} == {dtype}
    found, exact = tower.tokens(PIXELS), small(tmp_path).tokens(PIXELS)
    assert found.dtype == dtype
    assert torch.cosine_similarity(found.float(), exact, dim=-1).min() > 0.995
    assert precision in tower.info.name


def test_the_8b_has_its_published_shape() -> None:
    tower = load_tower(TowerConfig("eva_clip", "EVA-CLIP-8B", "BAAI/EVA-CLIP-8B"), device="meta")
    # the model card says 7.5B
    assert sum(parameter.numel() for parameter in tower.parameters()) == 7_526_088_704
    assert (tower.info.shape.tokens, tower.info.shape.width) == (257, 4096)
    assert tower.heads()[0]["projection"].shape == (4096, 1280)
    with torch.device("meta"):
        assert tower.tokens(torch.zeros(1, 3, 224, 224)).shape == (1, 257, 4096)


def test_random_weights_are_the_same_every_time() -> None:
    def build() -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return small("x", pretrained=False).tokens(PIXELS)

    assert torch.equal(build(), build())
    assert build().std() > 0


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean towers.*EVA-CLIP-8B"):
        load_tower(TowerConfig("eva_clip", "EVA-CLIP-8", "x"))
    with pytest.raises(UserError, match="no such weights file"):
        small(tmp_path / "absent.pt")
    with pytest.raises(UserError, match="holds no weights"):
        small(tmp_path)
    with pytest.raises(UserError, match="neither|cannot be reached"):
        small("some-org/some-model")  # the hub is off in tests
    hf = published()
    for name, change, word in (
        ("visual_projection.weight", torch.zeros(24, 47), "size mismatch"),
        (f"{LAYERS}.1.mlp.fc1.weight", None, "Missing"),
        (f"{LAYERS}.0.self_attn.k_proj.weight", None, "lack k"),
        (f"{LAYERS}.0.self_attn.q_proj.bias", torch.zeros(48), "lack k, v|Unexpected"),
        (f"{LAYERS}.3.layer_norm1.weight", torch.zeros(48), "Unexpected"),
    ):
        other = {key: value for key, value in hf.items() if key != name}
        other |= {} if change is None else {name: change}
        save_file(other, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=word):
            small(tmp_path)
    save_file(hf, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="blocks 0 to 2"):
        small(tmp_path, layer=3)


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_hostile_weights_are_not_run_and_not_followed(tmp_path: Path) -> None:
    torch.save(original(published()) | {"x": Payload(tmp_path / "ran")}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not readable as plain tensors"):
        small(tmp_path / "bad.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="not readable"):
        small(tmp_path / "cut.safetensors")
    outside = {"weight_map": {"vision_model.post_layernorm.weight": "../secret.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(outside))
    with pytest.raises(UserError, match="outside"):
        small(tmp_path)


def test_the_448_model_has_its_own_grid() -> None:
    assert ARCHITECTURES["EVA-CLIP-8B-448"]["img_size"] == 448
    tower = load_tower(TowerConfig("eva_clip", "EVA-CLIP-8B-448", "x"), device="meta")
    assert tower.info.shape.grid == (32, 32)
