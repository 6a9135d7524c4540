"""A sheet shows every picture in its place, and pages get them as data URLs."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image

from blip3o_lit.drawing.sheet import Drawing, Row, data_url, image_of, png_bytes, report_row, sheet
from blip3o_lit.report.captions import PICTURE

COLOURS = {"input": (1.0, 0.0, 0.0), "true tokens": (0.0, 1.0, 0.0), "mean": (0.0, 0.0, 1.0)}


def rows() -> list[Row]:
    drawings = [
        Drawing(label, torch.tensor(colour).view(3, 1, 1).expand(3, 8, 8), cosine)
        for (label, colour), cosine in zip(COLOURS.items(), (None, None, 0.98765))
    ]
    return [Row("best img-1", drawings), Row("worst img-2", drawings[:2])]


def test_a_data_url_is_the_picture_itself() -> None:
    picture = torch.rand(3, 8, 6)
    url = data_url(image_of(picture, side=1))
    assert PICTURE.fullmatch(url)
    content = base64.b64decode(url.partition(",")[2])
    levels = np.asarray(Image.open(io.BytesIO(content)))
    assert np.array_equal(levels, (picture * 255).round().byte().permute(1, 2, 0).numpy())


def test_enlarging_repeats_whole_pixels() -> None:
    picture = torch.rand(3, 8, 8)
    small = np.asarray(image_of(picture, side=8))
    large = np.asarray(image_of(picture, side=20))
    assert large.shape == (16, 16, 3)
    assert np.array_equal(large, small.repeat(2, 0).repeat(2, 1))


def test_a_sheet_holds_each_picture_once_per_row() -> None:
    image = sheet(rows(), side=32)
    again = Image.open(io.BytesIO(png_bytes(image)))
    levels = np.asarray(again)
    for (label, colour), count in zip(COLOURS.items(), (2, 2, 1)):
        same = (levels == np.round(np.array(colour) * 255)).all(-1)
        assert same.sum() == count * 32 * 32, label
    # The cosine stands below the third picture of the first row.
    blue = (levels == (0, 0, 255)).all(-1)
    top, left = np.argwhere(blue).max(0)[0] + 1, np.argwhere(blue).min(0)[1]
    below = levels[top : top + 14, left : left + 40]
    assert below.min() < 100


def test_a_report_row_keeps_labels_and_cosines() -> None:
    row = report_row(rows()[0])
    assert row["title"] == "best img-1"
    labels = [drawing["label"] for drawing in row["drawings"]]
    assert labels == list(COLOURS)
    assert "cosine" not in row["drawings"][0]
    assert row["drawings"][2]["cosine"] == 0.98765
    assert all(PICTURE.fullmatch(drawing["picture"]) for drawing in row["drawings"])
