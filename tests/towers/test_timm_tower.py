"""timm ViTs: tokens of each block, CLS and registers, files and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from torch import Tensor, nn

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.towers.head import TowerHead
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.timm_tower import TimmTower

TINY = "vit_tiny_patch16_224"


def tower(model: str, weights: str | None = None, size: int = 64, **changes: Any) -> TimmTower:
    config = TowerConfig("timm", model, weights, image_size=size, **changes)
    found = load_tower(config)
    assert isinstance(found, TimmTower)
    return found


def block_output(trunk: nn.Module, block: int, pixels: Tensor) -> Tensor:
    """What a block returns in a plain forward pass of timm."""
    seen: list[Tensor] = []
    handle = trunk.blocks[block].register_forward_hook(lambda *call: seen.append(call[2]))
    trunk(pixels)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    ("model", "size", "prefix", "cls"),
    [
        (TINY, 64, 1, True),
        ("vit_small_patch14_reg4_dinov2", 56, 5, True),  # CLS, then four registers
        ("vit_pwee_patch16_reg1_gap_256", 64, 1, False),  # a register, no CLS
        ("eva02_tiny_patch14_224", 56, 1, True),
    ],
)
def test_tokens_are_a_blocks_output_without_registers(
    model: str, size: int, prefix: int, cls: bool
) -> None:
    found = tower(model, size=size)
    for parameter in found.trunk.parameters():  # at birth CLS and registers are all near zero
        parameter.add_(0.1 * torch.randn_like(parameter))
    side = size // found.trunk.patch_embed.patch_size[0]
    assert found.info.shape.grid == (side, side)
    assert found.info.shape.cls is cls
    pixels = torch.randn(2, 3, size, size)
    full = block_output(found.trunk, -1, pixels)
    kept = full[:, [0, *range(prefix, full.shape[1])]] if cls else full[:, prefix:]
    tokens = found.tokens(pixels)
    assert tokens.shape == (2, found.info.shape.tokens, found.info.shape.width)
    assert (tokens - kept).abs().max() <= 1e-4


def test_any_block_and_the_final_norm() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    plain, normed = tower(TINY), tower(TINY, norm=True)
    assert torch.equal(tower(TINY, layer=3).tokens(pixels), tower(TINY, layer=-9).tokens(pixels))
    third = block_output(plain.trunk, 3, pixels)
    assert (tower(TINY, layer=3).tokens(pixels) - third).abs().max() <= 1e-5
    # same seed, same random weights: timm's own features are the normed tokens
    features = plain.trunk.forward_features(pixels)
    assert (normed.tokens(pixels) - features).abs().max() <= 1e-5
    with pytest.raises(UserError, match="blocks 0 to 11"):
        tower(TINY, layer=12)
    assert set(plain.heads()[0]) == {"norm.weight", "norm.bias"}
    assert plain.encode_text(["a cat"]) is None


def test_a_pooling_networks_norm_is_its_fc_norm() -> None:
    found = tower("vit_pwee_patch16_reg1_gap_256")
    fc_norm = found.trunk.fc_norm
    fc_norm_weight = found.heads()[0]["norm.weight"]
    assert torch.equal(fc_norm_weight, fc_norm.weight)


def test_preprocessing_is_timms_own() -> None:
    image = Image.fromarray(data.coffee())
    model = timm.create_model(TINY, img_size=64)
    settings = timm.data.resolve_model_data_config(model) | {"input_size": (3, 64, 64)}
    expected = timm.data.create_transform(**settings, is_training=False)(image)
    found = tower(TINY)
    assert torch.equal(found.preprocess(image), expected)
    assert found.info.preprocessing["mean"] == list(settings["mean"])
    assert found.preprocess(image.convert("L")).shape == (3, 64, 64)


def test_a_checkpoint_file_is_loaded_strictly(tmp_path: Path) -> None:
    torch.manual_seed(5)
    donor = timm.create_model(TINY, img_size=64).eval()  # with a classifier
    save_file(donor.state_dict(), tmp_path / "tiny.safetensors")
    pixels = torch.randn(1, 3, 64, 64)
    found = tower(TINY, str(tmp_path / "tiny.safetensors"))
    assert (found.tokens(pixels) - block_output(donor, -1, pixels)).abs().max() <= 1e-5
    assert found.info.name == f"timm:{TINY}/tiny.safetensors"
    state = donor.state_dict()
    state.pop("blocks.3.mlp.fc1.weight")
    torch.save(state, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part.pth: not the weights of.*Missing"):
        tower(TINY, str(tmp_path / "part.pth"))
    with pytest.raises(UserError, match=r"tiny.safetensors: not the weights"):
        tower("vit_wee_patch16_reg1_gap_256", str(tmp_path / "tiny.safetensors"))


def test_unknown_words_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean towers.*vit_tiny_patch16_224"):
        tower("vit_tiny_patch16_223")
    with pytest.raises(UserError, match="A tag goes into"):
        tower(f"{TINY}.augreg_in21k")
    with pytest.raises(UserError, match="did you mean augreg_in21k"):
        tower(TINY, "augreg_in21")
    with pytest.raises(UserError, match="is no ViT"):
        load_tower(TowerConfig("timm", "swin_tiny_patch4_window7_224"), device="meta")
    with pytest.raises(UserError, match="is no ViT"):
        load_tower(TowerConfig("timm", "convnext_atto"), device="meta")


def test_half_precision_is_close() -> None:
    pixels = torch.randn(1, 3, 64, 64)
    half, full = tower(TINY, precision="bf16"), tower(TINY)
    assert half.tokens(pixels).dtype == torch.bfloat16
    cosine = torch.cosine_similarity(half.tokens(pixels).float(), full.tokens(pixels), dim=-1)
    assert cosine.min() > 0.999


def test_a_projections_bias_moves_into_the_norm() -> None:
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(32), nn.Linear(32, 12)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    head = TowerHead(norm, linear.weight.T, None, linear.bias)
    tensors, _ = head.describe()
    x = torch.randn(5, 32)
    folded = nn.functional.layer_norm(x, (32,), tensors["norm.weight"], tensors["norm.bias"])
    assert (folded @ tensors["projection"] - linear(norm(x))).abs().max() <= 1e-5
    # the tower's own norm stays what it was
    assert torch.allclose(head.normalise(x), norm(x), atol=1e-6)
    assert "projection" not in head.describe(normed=True)[0]  # no norm is left to carry it
    wide = nn.Linear(32, 48)  # more outputs than inputs: no shift of the norm equals the bias
    assert "projection" not in TowerHead(norm, wide.weight.T, None, wide.bias).describe()[0]
