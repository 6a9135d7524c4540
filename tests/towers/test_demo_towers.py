"""The two demo towers, from the committed weights."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import normalize

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import scene

COUNT = 96


@pytest.fixture(scope="module")
def seen():
    """Held-out scenes, both towers, and their tokens."""
    scenes = [scene("validation", index) for index in range(COUNT)]
    towers = {name: demo.load(name) for name in demo.NAMES}
    tokens = {}
    with torch.inference_mode():
        for name, tower in towers.items():
            images = torch.stack([tower.preprocess(drawn.image) for drawn in scenes])
            tokens[name] = torch.cat([tower.tokens(part) for part in images.split(16)])
    return [drawn.caption for drawn in scenes], towers, tokens


def test_tokens_have_the_promised_shape_and_are_finite(seen):
    _, towers, tokens = seen
    for name, tower in towers.items():
        shape = tower.info.shape
        assert (shape.grid, shape.cls) == ((16, 16), True)
        assert tokens[name].shape == (COUNT, shape.tokens, shape.width)
        assert tokens[name].dtype == torch.float32
        assert tokens[name].isfinite().all()
        assert tokens[name].abs().max() < 6e4
        assert not any(weight.requires_grad for weight in tower.parameters())


def test_tokens_are_the_last_blocks_output_before_the_norm(seen):
    _, towers, tokens = seen
    picture = torch.stack([towers["eva"].preprocess(scene("validation", 0).image)])
    grabbed = {}
    last = {"eva": towers["eva"].trunk.blocks[-1]}
    last["clip"] = towers["clip"].model.visual.transformer.resblocks[-1]
    for name, block in last.items():
        hook = block.register_forward_hook(lambda *a, name=name: grabbed.update({name: a[-1]}))
        with torch.inference_mode():
            towers[name].tokens(picture)
        hook.remove()
        found = grabbed[name][0] if grabbed[name].shape[0] == 1 else grabbed[name][:, 0]
        torch.testing.assert_close(tokens[name][0], found, atol=1e-4, rtol=1e-4)


def test_heads_give_the_towers_own_features(seen):
    _, towers, tokens = seen
    for name, tower in towers.items():
        tensors, metadata = tower.heads()
        head = Head(tensors, metadata)
        assert tensors["logit_scale"].shape == ()
        with torch.inference_mode():
            expected = tower.project(tokens[name][:, 0])
        torch.testing.assert_close(head(tokens[name])[:, 0], expected, atol=1e-4, rtol=1e-4)


def test_held_out_scenes_find_their_captions(seen):
    captions, towers, tokens = seen
    with torch.inference_mode():
        image = normalize(towers["clip"].project(tokens["clip"][:, 0]), dim=-1)
        text = towers["clip"].encode_text(captions)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(COUNT))
    best = (image @ text.T).topk(5).indices
    right = torch.tensor([[a == b for b in captions] for a in captions]).gather(1, best)
    assert right.any(1).float().mean() > 0.6  # chance: 0.05


def test_the_weights_are_small_half_precision_and_carded():
    files = [demo.WEIGHTS / f"{name}.safetensors" for name in demo.NAMES]
    assert sum(file.stat().st_size for file in files) < 8e6
    assert {value.dtype for file in files for value in load_file(file).values()} == {torch.float16}
    card = (demo.WEIGHTS / "README.md").read_text("utf-8")
    for word in ("scripts/train_demo_towers.py", "seconds", "R@5", "scans"):
        assert word in card


def test_random_weights_have_a_fixed_seed():
    first, again = demo.load("clip", pretrained=False), demo.load("clip", pretrained=False)
    for a, b in zip(first.parameters(), again.parameters()):
        assert torch.equal(a, b)


def test_words_outside_the_vocabulary_are_left_out():
    plain = demo.tokenize(["a red seven at the top"])
    assert torch.equal(plain, demo.tokenize(["a shiny Red seven at the top"]))
    assert plain[0].argmax() == 6
    assert demo.tokenize(["red " * 100]).shape == (1, demo.TEXT.context_length)


def test_an_unknown_tower_is_refused():
    with pytest.raises(UserError, match="did you mean demo tower=clip"):
        demo.load("clap")
