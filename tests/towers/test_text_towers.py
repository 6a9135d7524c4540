"""Text towers: a caption's states are the library's own, up to and with the end word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from towers.test_transformers_tower import TEXT, noisy, small_clip

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TextTowerConfig
from blip3o_lit.towers import demo
from blip3o_lit.towers.open_clip_text import OpenClipText
from blip3o_lit.towers.text_tower import TextTower, load_text_tower

CAPTIONS = ["a red seven", "two dogs on a hill, in the rain", ""]
SCENES = ["a red seven at the top left", "a blue two at the centre, a pink zero at the top", ""]
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "seven", "two", "dogs", "on", "hill", "in", "the"]


def save_words(folder: Path) -> None:
    """Save a tokenizer of whole words that ends captions with </s>, as SigLIP's and T5's do."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def saved(model: Any, folder: Path, words: bool = True) -> TextTower:
    model.save_pretrained(folder)
    if words:
        save_words(folder)
    return load_text_tower(TextTowerConfig("transformers", pretrained=str(folder)))


def close(states: list[Tensor], expected: list[Tensor]) -> None:
    assert [len(row) for row in states] == [len(row) for row in expected]
    for row, other in zip(states, expected, strict=True):
        torch.testing.assert_close(row, other, rtol=1e-5, atol=1e-5)


def test_the_demos_states_are_what_its_text_side_projects() -> None:
    tower = load_text_tower(TextTowerConfig("demo"))
    states = tower.states(SCENES)
    assert [len(row) for row in states] == [8, 14, 1]  # words, the comma, and the end word
    assert all(row.shape[1] == tower.info.width == 128 for row in states)
    clip = demo.load("clip")
    assert isinstance(clip, demo.DemoClip)
    projection: Any = clip.model.text_projection
    ends = torch.nn.functional.normalize(torch.stack([row[-1] for row in states]) @ projection)
    torch.testing.assert_close(ends, clip.encode_text(SCENES), rtol=1e-5, atol=1e-5)
    assert tower.states([]) == []
    for caption, row in zip(SCENES, states, strict=True):
        close(tower.states([caption]), [row])
    long = tower.states([" ".join(["red"] * 50)])[0]
    assert len(long) == tower.info.longest == 24


def test_clips_states_end_with_the_end_word(tmp_path: Path) -> None:
    model = small_clip()
    tower = saved(model, tmp_path, words=False)
    numbers = open_clip.SimpleTokenizer()(CAPTIONS)
    own = model.text_model(input_ids=numbers).last_hidden_state
    expected = [row[: int(n.argmax()) + 1] for row, n in zip(own, numbers, strict=True)]
    close(tower.states(CAPTIONS), expected)
    assert (tower.info.width, tower.info.longest) == (32, 77)
    assert len(tower.states([" ".join(["dogs"] * 100)])[0]) == 77


def test_an_open_clip_text_side_gives_its_own_states() -> None:
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(
        layers=1, width=32, head_width=16, image_size=28, patch_size=14
    )
    text = open_clip.CLIPTextCfg(width=32, heads=2, layers=2)
    model = noisy(open_clip.CLIP(16, vision, text))
    numbers = open_clip.get_tokenizer("ViT-B-32")(CAPTIONS)
    projection = model.text_projection
    pooled = model.encode_text(numbers)
    tower = OpenClipText(model, "open_clip:small", "ViT-B-32").eval()
    states = tower.states(CAPTIONS)
    assert [len(row) for row in states] == [5, 11, 2]
    ends = torch.stack([row[-1] for row in states]) @ projection
    torch.testing.assert_close(ends, pooled, rtol=1e-5, atol=1e-5)
    assert not hasattr(model, "visual")  # no weights of pictures are kept


@pytest.mark.parametrize("whole", [True, False])
def test_siglips_states_are_of_the_full_length_it_learnt_with(tmp_path: Path, whole: bool) -> None:
    sides: dict[str, Any] = TEXT | {
        "vocab_size": len(WORDS),
        "max_position_embeddings": 16,
        "eos_token_id": 1,
    }
    if whole:
        vision = {k: TEXT[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers")}
        vision |= {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
        config = transformers.SiglipConfig(text_config=sides, vision_config=vision)
        model = noisy(transformers.SiglipModel(config))
        text = model.text_model
    else:
        model = text = noisy(transformers.SiglipTextModel(transformers.SiglipTextConfig(**sides)))
    tower = saved(model, tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoded = words(CAPTIONS, padding="max_length", max_length=16, return_tensors="pt")
    own = text(input_ids=encoded["input_ids"]).last_hidden_state
    lengths = encoded["attention_mask"].sum(1).tolist()
    close(tower.states(CAPTIONS), [row[:n] for row, n in zip(own, lengths, strict=True)])
    assert lengths == [4, 10, 1]
    assert tower.info.longest == 16


@pytest.mark.parametrize("decoder", [True, False])
def test_a_t5_encoders_states_leave_the_padding_out(tmp_path: Path, decoder: bool) -> None:
    config = transformers.T5Config(
        vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    kind = transformers.T5ForConditionalGeneration if decoder else transformers.T5EncoderModel
    model: Any = noisy(kind(config))
    tower = saved(model, tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoder = model.get_encoder() if decoder else model
    expected = [
        encoder(input_ids=words(c, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        for c in CAPTIONS
    ]
    close(tower.states(CAPTIONS), expected)
    assert tower.info.width == 32


def test_what_has_no_text_side_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"towers\.text\.kind"):
        TextTowerConfig("timm")
    with pytest.raises(UserError, match=r"needs towers\.text\.pretrained"):
        load_text_tower(TextTowerConfig("transformers"))
    with pytest.raises(UserError, match=r"needs towers\.text\.model"):
        load_text_tower(TextTowerConfig("open_clip"))
    config = transformers.Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "dino")
    with pytest.raises(UserError, match="dinov2"):
        load_text_tower(TextTowerConfig("transformers", pretrained=str(tmp_path / "dino")))
    sides: dict[str, Any] = TEXT | {"vocab_size": len(WORDS), "max_position_embeddings": 16}
    silent = transformers.SiglipTextModel(transformers.SiglipTextConfig(**sides))
    silent.save_pretrained(tmp_path / "silent")
    with pytest.raises(UserError, match="tokenizer"):
        load_text_tower(TextTowerConfig("transformers", pretrained=str(tmp_path / "silent")))
    pickled = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=12, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    pickled.config.save_pretrained(tmp_path / "pickled")
    torch.save(pickled.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load_text_tower(TextTowerConfig("transformers", pretrained=str(tmp_path / "pickled")))


def test_clip_l_has_its_real_shapes_without_weights() -> None:
    config = TextTowerConfig("transformers", "ViT-L-14-quickgelu", "openai/clip-vit-large-patch14")
    for kind in (config, TextTowerConfig("open_clip", "ViT-L-14-quickgelu", "openai")):
        info = load_text_tower(kind, device="meta").info
        assert (info.width, info.longest) == (768, 77)
