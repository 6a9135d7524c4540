"""A pretrained decoder draws as diffusers does, and no other tower's tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_decoder import TOWERS, saved, spec
from torch.nn import functional as F

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.decoder import load_decoder
from blip3o_lit.tokens.store.index import ArraySpec


@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("cls", [True, False])
def test_it_draws_what_diffusers_decodes(tmp_path: Path, family: str, cls: bool) -> None:
    theirs = saved(tmp_path, family)
    ours = load_decoder(str(tmp_path), spec(family), TokenShape((4, 4), cls, 64))
    tokens = 3 * torch.randn(2, 16 + cls, 64) + 1
    normed = F.layer_norm(tokens[:, int(cls) :], (64,), eps=1e-6)
    latents = normed.transpose(1, 2).reshape(2, 64, 4, 4)
    with torch.no_grad():
        expected = theirs.decode(theirs._normalize_latents(latents) * 2.0).sample
    drawn = ours.draw(tokens)
    assert drawn.shape == (2, 3, 32, 32)
    assert (drawn - expected.clamp(0, 1)).abs().max() <= 1e-5
    assert drawn.std() > 0.01


def test_it_draws_the_encoder_s_own_tokens_as_the_whole_autoencoder_does(tmp_path: Path) -> None:
    theirs = saved(tmp_path)
    ours = load_decoder(str(tmp_path), spec(), TokenShape((4, 4), True, 64))
    raw = []
    block = theirs.encoder.encoder.layer[-1]
    hook = block.register_forward_hook(lambda *call: raw.append(call[2]))
    with torch.no_grad():
        expected = theirs(torch.rand(1, 3, 56, 56)).sample
    hook.remove()
    output = raw[0][0] if isinstance(raw[0], tuple) else raw[0]
    tokens = torch.cat([output[:, :1], output[:, 5:]], 1)
    assert (ours.draw(tokens) - expected.clamp(0, 1)).abs().max() <= 1e-5


def test_shards_are_read_and_the_encoder_half_is_not_needed(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    saved(whole)
    saved(parts, max_shard_size="100KB")
    index = json.loads((parts / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = {True: set(), False: set()}
    for name, file in index["weight_map"].items():
        files[name.startswith(("decoder.", "encoder_"))].add(file)
    for file in files[False] - files[True]:
        (parts / file).unlink()
    assert files[False] - files[True]
    shape, tokens = TokenShape((4, 4), True, 64), torch.randn(1, 17, 64)
    one, other = (load_decoder(str(folder), spec(), shape) for folder in (whole, parts))
    assert torch.equal(one.draw(tokens), other.draw(tokens))
    assert not [name for name, _ in one.named_parameters() if "encoder" in name]


@pytest.mark.parametrize(
    ("array", "shape", "words"),
    [
        (spec(tower="open_clip:ViT-L-14/openai"), (4, 4, 64), "these are of open_clip:ViT-L-14"),
        (spec(tower="huggingface:dinov2-base"), (4, 4, 64), "dinov2 with registers"),
        (spec(), (4, 4, 32), "that are 64 wide; these are 32"),
        (spec(), (8, 8, 64), "4x4 grid; these have 8x8"),
        (spec(preprocessing={"size": 224}), (4, 4, 64), "at 56 px; these are at 224 px"),
        (spec(normed=True), (4, 4, 64), "towers.target.norm=false"),
        (spec(layer=3), (4, 4, 64), "towers.target.layer=-1"),
        (spec(projected=True), (4, 4, 64), "mode.projected=false"),
    ],
)
def test_tokens_of_another_tower_are_refused_in_one_line(
    tmp_path: Path, array: ArraySpec, shape: tuple[int, int, int], words: str
) -> None:
    saved(tmp_path)
    with pytest.raises(UserError) as refusal:
        load_decoder(str(tmp_path), array, TokenShape(shape[:2], True, shape[2]))
    assert words in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_folders_that_are_no_decoder_are_named(tmp_path: Path) -> None:
    shape = TokenShape((4, 4), True, 64)

    def refusal(folder: Path) -> str:
        with pytest.raises(UserError) as raised:
            load_decoder(str(folder), spec(), shape)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    assert "is a AutoencoderKL, not an AutoencoderRAE" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in refusal(tmp_path)
    pickled = tmp_path / "pickled"
    saved(pickled, safe_serialization=False)
    assert list(pickled.glob("*.bin"))
    assert "pickled weights are not read" in refusal(pickled)
    cut = tmp_path / "cut"
    saved(cut)
    weights = cut / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "not readable as plain tensors" in refusal(cut)
    other = tmp_path / "other"
    saved(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"decoder_hidden_size": 32}))
    assert "not the weights of its own config.json" in refusal(other)
