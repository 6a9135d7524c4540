"""Words in the same pass: all states of all captions; stores without them stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extraction.test_extraction import jpeg

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.towers import TextTowerConfig
from blip3o_lit.extraction.demo import demo_source
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.item import Item, Source, slices
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import Place, TokenStore
from blip3o_lit.towers import demo, scenes
from blip3o_lit.towers.text_tower import TextTower, load_text_tower

CAPTIONS = (
    ("a red seven", "a seven at the top", "a pink two"),
    (),
    ("a blue two", ""),
    ("an orange one at the left",),
)


@pytest.fixture(scope="module")
def towers() -> dict[str, Any]:
    return {name: demo.load(name) for name in demo.NAMES}


@pytest.fixture(scope="module")
def text() -> TextTower:
    return load_text_tower(TextTowerConfig("demo"))


def config(captions: int = 3, **changes: Any) -> ExtractConfig:
    engine = EngineConfig(batch_size=4, shard_samples=8, threads=2, device="cpu")
    return ExtractConfig(images="demo", extract=engine, captions=captions, **changes)


def captioned() -> Source:
    items = [
        Item(f"{n}.jpg", lambda n=n: jpeg(n), own[0] if own else "", further=own[1:])
        for n, own in enumerate(CAPTIONS)
    ]
    return Source("pictures", slices(items, 8))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_scenes_keep_every_phrasing(
    tmp_path: Path, towers: dict[str, Any], text: TextTower
) -> None:
    index = extract(demo_source(10, 4, 8), towers, tmp_path, config(), text).index
    assert index is not None
    assert index.arrays["words"].shape == (24, 128)
    assert TextTowerConfig(**index.arrays["words"].preprocessing) == TextTowerConfig("demo")
    store = TokenStore.open(tmp_path)
    for sample in range(8):
        own = scenes.phrasings(scenes.scene("train", sample).caption)
        facts = store.shard(0).metadata(sample)
        assert facts["caption"] == own[0]
        assert tuple(facts.get("captions", own)) == own
        words_RE, lengths_K = store.read_captions(Place(0, sample), "words")
        assert lengths_K.tolist() == [len(s) for s in text.states([*own])] + [0] * (3 - len(own))
        expected = torch.cat(text.states([*own]))
        torch.testing.assert_close(words_RE.float(), expected, rtol=2e-3, atol=2e-3)
    reader = TokenReader(store, "train", ["eva", "words"], "clip")
    batch = reader.read(np.arange(4))["condition"]
    firsts = text.states([scenes.scene("train", n).caption for n in range(4)])
    assert batch.length.tolist() == [len(states) for states in firsts]


def test_pictures_keep_as_many_captions_as_they_have(
    tmp_path: Path, towers: dict[str, Any], text: TextTower
) -> None:
    settings = config(2, max_reject_fraction=0.5)
    settings.split.fraction = 0.0
    extract(captioned(), towers, tmp_path, settings, text)
    store = TokenStore.open(tmp_path)
    found = {}
    for number, entry in enumerate(store.index.shards):
        for sample in range(entry.samples):
            facts = store.shard(number).metadata(sample)
            lengths_K = store.read_captions(Place(number, sample), "words")[1]
            found[facts["source"]] = (facts["caption"], lengths_K.tolist())
    assert found == {
        "0.jpg": ("a red seven", [4, 6]),
        "1.jpg": ("", [0, 0]),
        "2.jpg": ("a blue two", [4, 0]),
        "3.jpg": ("an orange one at the left", [7, 0]),
    }


def test_workers_and_interruptions_give_the_same_words(
    tmp_path: Path, towers: dict[str, Any], text: TextTower
) -> None:
    source = demo_source(20, 4, 8)
    extract(source, towers, tmp_path / "plain", config(), text)
    for worker in (1, 0):
        settings = config()
        settings.extract.shard = f"{worker}/2"
        extract(source, towers, tmp_path / "workers", settings, text)
    assert content(tmp_path / "plain") == content(tmp_path / "workers")
    with pytest.raises(UserError, match="towers"):
        extract(source, towers, tmp_path / "plain", config())


def test_without_a_text_tower_nothing_changes(tmp_path: Path, towers: dict[str, Any]) -> None:
    """Further captions and the key `captions` leave no trace in a store without words."""
    plain = [
        Item(f"{n}.jpg", lambda n=n: jpeg(n), own[0] if own else "")
        for n, own in enumerate(CAPTIONS)
    ]
    extract(Source("pictures", slices([*plain], 8)), towers, tmp_path / "plain", config(1))
    extract(captioned(), towers, tmp_path / "further", config(5))
    assert content(tmp_path / "plain") == content(tmp_path / "further")


def test_phrasings_begin_with_the_scenes_own() -> None:
    caption = "a red one at the top, a blue two at the left, a pink six at the centre"
    assert scenes.phrasings(caption) == (
        caption,
        "a blue two at the left, a pink six at the centre, a red one at the top",
        "a pink six at the centre, a red one at the top, a blue two at the left",
    )
    assert scenes.phrasings("a red one at the top") == ("a red one at the top",)
