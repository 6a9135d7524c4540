"""The reader of scenes finds again what a caption names, and only chance in other scenes."""

from __future__ import annotations

import pytest
import torch
from small_reader import small_reader

from blip3o_lit.drawing.digits import scenes_of
from blip3o_lit.drawing.scene_reader import (
    COLOURS,
    PLACES,
    Named,
    SceneReader,
    colour_reader,
    named_in,
)
from blip3o_lit.evaluation.named_digits import NamedDigits
from blip3o_lit.towers import scenes


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> SceneReader:
    return SceneReader(small_reader(tmp_path_factory.mktemp("readers")), colour_reader(300))


@pytest.fixture(scope="module")
def held() -> tuple[torch.Tensor, list[str]]:
    return scenes_of("validation", 60)[0], [
        scenes.scene("validation", number).caption for number in range(60)
    ]


def test_captions_name_digits_with_colours_and_places() -> None:
    caption = "a red seven at the top left, an orange zero at the centre"
    assert named_in(caption) == [
        Named(7, COLOURS.index("red"), PLACES.index("top left")),
        Named(0, COLOURS.index("orange"), PLACES.index("centre")),
    ]
    assert named_in("two dogs at the top, a red cat at the left, a red seven") == []


def test_held_out_scenes_show_their_captions_and_no_others(
    reader: SceneReader, held: tuple[torch.Tensor, list[str]]
) -> None:
    pictures, captions = held
    named = NamedDigits(reader)
    named.add("true", pictures, captions)
    named.add("blank", torch.full_like(pictures, 0.2), captions)
    result = named.result()
    true, swapped = result["shares"]["true"], result["swapped"]["true"]
    assert true["digit"] > 0.75
    assert true["colour"] > 0.95
    assert true["place"] > 0.97
    assert true["empty"] > 0.95
    assert swapped["all"] < 0.1
    assert swapped["place"] < 0.5
    blank = result["shares"]["blank"]
    assert blank["place"] == blank["digit"] == blank["colour"] == 0
    assert blank["empty"] == 1
    ones = sum(len(named_in(caption)) == 1 for caption in captions)
    assert result["one_digit"]["true"]["digits"] == ones
    assert named.scores("true")["named_digit"] == true["digit"]
    assert named.scores("nobody") == {}


def test_a_wrong_word_is_counted_where_it_is_wrong(
    reader: SceneReader, held: tuple[torch.Tensor, list[str]]
) -> None:
    pictures, captions = held
    turned = {word: COLOURS[(n + 1) % len(COLOURS)] for n, word in enumerate(COLOURS)}
    wrong = [" ".join(turned.get(word, word) for word in text.split()) for text in captions]
    right, changed = (reader.read(pictures).found(texts) for texts in (captions, wrong))
    assert torch.equal(right["digit"], changed["digit"])
    assert torch.equal(right["place"], changed["place"])
    assert changed["colour"].double().mean() < 0.1
