"""The condition tower of `data=demo_masked` knows nothing of the right half of a picture."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import scene


def test_tokens_depend_on_the_left_half_alone() -> None:
    tower = demo.LeftHalf(demo.load("eva", pretrained=False)).eval()
    picture = scene("validation", 1).image
    pixels = np.asarray(picture)
    right, left = pixels.copy(), pixels.copy()
    right[:, 32:] = 255 - right[:, 32:]
    left[:, :32] = 255 - left[:, :32]
    images = [picture, Image.fromarray(right), Image.fromarray(left)]
    tokens = tower.tokens(torch.stack([tower.preprocess(image) for image in images]))
    torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=0)
    assert (tokens[0] - tokens[2]).abs().max() > 1e-3
    assert np.array_equal(np.asarray(picture), pixels)


def test_the_index_can_tell_it_from_the_whole_tower() -> None:
    whole = demo.load("eva", pretrained=False)
    info = demo.LeftHalf(whole).info
    assert info.name != whole.info.name
    assert info.shape == whole.info.shape
    assert info.preprocessing["visible"] == "left half"
