"""A thumbnail is what the target tower sees, small."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.readout import psnr
from blip3o_lit.drawing.thumbnail import BYTES, opened, thumbnail
from blip3o_lit.towers import demo, scenes
from blip3o_lit.towers.tower import TowerInfo

CLIP = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}


def test_a_scene_comes_back_whole_and_small() -> None:
    tower = demo.load("clip", pretrained=False)
    for index in range(4):
        image = scenes.scene("train", index).image
        content = thumbnail(tower.preprocess(image), tower.info)
        assert len(content) <= BYTES
        back = opened([content], ["k"])
        true = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
        assert back.shape == (1, 3, 64, 64)
        assert psnr(back, true).item() > 40


def test_a_photo_is_averaged_to_four_pixels_per_patch() -> None:
    info = TowerInfo("clip", TokenShape((16, 16), True, 8), preprocessing=CLIP)
    photo = Image.fromarray(data.astronaut()).resize((224, 224))
    pixels = torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255
    shift, scale = (torch.tensor(CLIP[key]).view(3, 1, 1) for key in ("mean", "std"))
    content = thumbnail((pixels - shift) / scale, info)
    assert content.startswith(b"\xff\xd8")
    assert len(content) <= 1.5 * BYTES
    true = torch.nn.functional.interpolate(pixels[None], (64, 64), mode="area")
    assert psnr(opened([content], ["k"]), true).item() > 26


def test_patches_of_few_pixels_are_not_enlarged() -> None:
    info = TowerInfo("small", TokenShape((4, 8), False, 8), image_size=16)
    content = thumbnail(torch.rand(3, 8, 16), info)
    assert opened([content], ["k"]).shape == (1, 3, 8, 16)
    plain = replace(info, preprocessing={"mean": None, "std": None})
    assert thumbnail(torch.zeros(3, 8, 16), plain) == thumbnail(torch.zeros(3, 8, 16), info)


def test_a_damaged_thumbnail_names_its_sample() -> None:
    info = TowerInfo("small", TokenShape((4, 4), False, 8))
    content = thumbnail(torch.rand(3, 16, 16), info)
    for damaged in (b"", b"no picture", content[: len(content) // 2]):
        with pytest.raises(UserError, match="sample seven: its thumbnail is damaged"):
            opened([content, damaged], ["six", "seven"])
