"""The images that an evaluation shows: by rank, with their own pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_lit.config.errors import UserError
from blip3o_lit.evaluation.examples import EXAMPLES, examples, worst
from blip3o_lit.metrics.retrieval import Retrieval, caption_ids
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter
from blip3o_lit.towers.scenes import scene, scene_of

COUNT = 12


@pytest.fixture
def held(tmp_path: Path) -> TokenReader:
    """Twelve samples: ten from files, two from demo scenes."""
    spec = ArraySpec("tokens", "float16", (4, 8), grid=(2, 2))
    zeros = np.zeros(spec.shape, np.float16)
    with TokenWriter(tmp_path / "store", {"eva": spec, "clip": spec}) as writer:
        for number in range(COUNT):
            source = f"{number}.png" if number < 10 else f"scene:validation-{number:06d}"
            writer.add("validation", f"{number:03d}", {"eva": zeros, "clip": zeros},
                       f"caption {number}", source)  # fmt: skip
    return TokenReader(TokenStore.open(tmp_path / "store"), "validation")


def pixels(data_url: str) -> np.ndarray:
    """Decode a picture of the report."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data_url.partition(",")[2]))))


def test_examples_are_ranked_and_show_their_own_pictures(held: TokenReader, tmp_path: Path) -> None:
    for number in range(10):
        Image.new("RGB", (300, 200), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    cosine_B = np.random.default_rng(0).permutation(COUNT) / COUNT
    found = examples(held, cosine_B, {}, str(tmp_path))
    order = np.argsort(cosine_B)
    assert [row["key"] for row in found["worst"]] == [f"{n:03d}" for n in order[:EXAMPLES]]
    assert [row["key"] for row in found["best"]] == [f"{n:03d}" for n in order[::-1][:EXAMPLES]]
    assert [row["key"] for row in found["median"]] == [f"{n:03d}" for n in order[4:8]]
    for row in found["best"] + found["median"] + found["worst"]:
        number, shown = int(row["key"]), pixels(row["picture"])
        assert row["cosine"] == cosine_B[number]
        if number < 10:
            assert shown.shape == (85, 128, 3)
            assert (shown[:, :, 0] == 10 * number).all()
        else:
            own = np.asarray(scene("validation", number).image)
            assert (shown[::2, ::2] == own).all()


def test_captions_are_those_of_the_nearest_text(held: TokenReader) -> None:
    text = torch.eye(COUNT)
    shift = torch.roll(text, 1, dims=0)
    ids = caption_ids([f"caption {n}" for n in range(COUNT)])
    recall = {"generated": Retrieval(), "true": Retrieval()}
    recall["generated"].update(shift, text, ids)
    recall["true"].update(text, text, ids)
    found = examples(held, np.arange(COUNT) / COUNT, recall, None)
    for row in found["best"]:
        number = int(row["key"])
        assert row["caption_true"] == f"caption {number}"
        assert row["caption_generated"] == f"caption {(number - 1) % COUNT}"
        assert ("picture" in row) == (number >= 10)


def test_sources_outside_the_folder_are_not_shown(held: TokenReader, tmp_path: Path) -> None:
    outside = tmp_path / "0.png"
    Image.new("RGB", (8, 8)).save(outside)
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "0.png").symlink_to(outside)
    (inner / "1.png").write_bytes(b"no picture")
    found = examples(held, np.arange(COUNT) / COUNT, {}, str(inner))
    assert all("picture" not in row for row in found["worst"])


def test_a_missing_folder_is_named(held: TokenReader, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pictures=.*is no folder"):
        examples(held, np.ones(COUNT), {}, str(tmp_path / "none"))


def test_worst_is_one_percent_and_at_least_one(held: TokenReader) -> None:
    assert [row["key"] for row in worst(held, np.arange(COUNT)[::-1] / COUNT)] == ["011"]


def test_a_scene_is_found_by_its_key() -> None:
    for drawn in (scene("train", 3), scene("validation", 5, seed=9)):
        assert scene_of(drawn.key) == drawn
    with pytest.raises(UserError, match="is no scene"):
        scene_of("train-1")
