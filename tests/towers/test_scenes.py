"""Demo scenes: pure, true to their captions, and split by source scan."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits

from blip3o_lit.config.errors import UserError
from blip3o_lit.towers import scenes
from blip3o_lit.towers.scenes import COLOURS, DIGITS, PLACES, SIZE, WORDS, scan_rows, scene


def test_no_scan_and_no_copy_of_one_is_in_both_splits():
    images = load_digits().images
    hashes = {
        split: {hashlib.sha256(images[row].tobytes()).hexdigest() for row in scan_rows(split)}
        for split in scenes.SPLITS
    }
    assert not hashes["train"] & hashes["validation"]
    assert len(scan_rows("train")) + len(scan_rows("validation")) == 1797
    assert 0.17 < len(scan_rows("validation")) / 1797 < 0.23
    used = {
        split: {scan for index in range(300) for scan in scene(split, index).scans}
        for split in scenes.SPLITS
    }
    assert used["train"] <= set(scan_rows("train").tolist())
    assert used["validation"] <= set(scan_rows("validation").tolist())


def test_a_scene_is_a_pure_function_of_split_index_and_seed():
    first, again = scene("train", 7), scene("train", 7)
    assert first.image.tobytes() == again.image.tobytes()
    assert (first.caption, first.key, first.scans) == (again.caption, again.key, again.scans)
    others = [scene("train", 8), scene("validation", 7), scene("train", 7, seed=1)]
    assert all(other.image.tobytes() != first.image.tobytes() for other in others)
    assert len({first.key, *(other.key for other in others)}) == 4


def test_captions_say_what_is_shown():
    target = load_digits().target
    counts = set()
    for index in range(200):
        drawn = scene("validation", index)
        pixels = np.asarray(drawn.image, np.float32)
        assert pixels.shape == (SIZE, SIZE, 3)
        phrases = drawn.caption.split(", ")
        counts.add(len(phrases))
        assert len(phrases) == len(drawn.scans)
        for phrase, scan in zip(phrases, drawn.scans):
            words = phrase.split()
            assert words[2] == DIGITS[target[scan]]
            place = phrase.split(" at the ")[1]
            x, y = PLACES[place]
            near = pixels[max(y - 12, 0) : y + 12, max(x - 12, 0) : x + 12].reshape(-1, 3)
            distance = np.abs(near - np.array(COLOURS[words[1]])).sum(1).min()
            assert distance < 40, (drawn.caption, phrase)
        assert drawn.label == (DIGITS[target[drawn.scans[0]]] if len(phrases) == 1 else "")
    assert counts == {1, 2, 3}


def test_the_ground_is_never_black_and_varies():
    corners = np.array([np.asarray(scene("train", index).image)[0, 0] for index in range(100)])
    assert corners.min() > 10
    assert corners.std(0).min() > 5


def test_every_word_is_in_the_vocabulary():
    for index in range(200):
        assert set(scene("train", index).caption.replace(",", " ,").split()) <= set(WORDS)


def test_another_split_is_refused_with_the_nearest_word():
    with pytest.raises(UserError, match="did you mean split=validation"):
        scene("validatoin", 0)
