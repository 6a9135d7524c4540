"""What the hidden half shows: counted right where the truth is known."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import make_run, small_config
from PIL import Image
from small_reader import small_reader

from blip3o_lit.base.home import fits
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.drawing import digits
from blip3o_lit.drawing.digits import DigitReader, scenes_of
from blip3o_lit.evaluate import evaluate
from blip3o_lit.evaluation.hidden_half import HiddenHalf
from blip3o_lit.tokens.store.index import ArraySpec
from blip3o_lit.tokens.store.shards import TokenWriter
from blip3o_lit.towers import scenes

SPEC = ArraySpec("tokens", "float32", (64, 12), grid=(8, 8), tower="pixels")
FEW: dict[str, object] = {"solvers": ["euler-2"], "curve": [], "images": 24, "sample_images": 8}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> DigitReader:
    return small_reader(tmp_path_factory.mktemp("readers"))


def test_shares_and_draws_of_scenes_that_are_known(reader: DigitReader) -> None:
    pictures, true = scenes_of("validation", 48)
    captions = [scenes.scene("validation", number).caption for number in range(48)]
    empty = pictures.clone()
    empty[..., 32:] = 0.1
    half = HiddenHalf(reader)
    for part in (slice(0, 32), slice(32, 48)):  # batches, as the evaluation gives them
        half.add("true", pictures[part])
        half.add("mean", empty[part])
        half.add_captions(captions[part])
    half.add_draws(pictures[:8].expand(3, -1, -1, -1, -1))
    result = half.result()
    assert result["shares"]["mean"]["digit"] == 0
    shown = (true[:, [2, 5, 8]] != digits.NOTHING).any(1).double().mean()
    assert abs(result["shares"]["true"]["digit"] - float(shown)) < 0.15
    assert sum(result["shares"]["true"].values()) == pytest.approx(1)
    assert result["reader_on_true_tokens"]["digit"] > 0.7
    # The same picture three times is one half, three other scenes are mostly three.
    assert result["draws"]["different_halves"] == 1
    assert result["draws"]["different_halves_of_as_many_true_images"] > 1.5
    apart = HiddenHalf(reader)
    apart.add("true", pictures)
    apart.add_captions(captions)
    apart.add_draws(pictures.unflatten(0, (3, 16)))
    assert apart.result()["draws"]["different_halves"] > 1.5


def scene_store(folder: Path, source: str) -> Path:
    """Write demo scenes whose target tokens are the pixels of 8x8 px, averaged to 2x2 px."""
    rng = np.random.default_rng(0)
    settings = {"shard_samples": 32, "thumbnails": True}
    with TokenWriter(folder, {"eva": SPEC, "clip": SPEC}, **settings) as writer:
        for split, count in (("train", 64), ("validation", 24)):
            for number in range(count):
                scene = scenes.scene(split, number)
                small = np.asarray(scene.image.resize((16, 16), Image.Resampling.BOX)) / 255
                patches = small.reshape(8, 2, 8, 2, 3).transpose(0, 2, 1, 3, 4).reshape(64, 12)
                out = io.BytesIO()
                scene.image.resize((32, 32), Image.Resampling.BOX).save(out, "JPEG", quality=95)
                arrays = {"eva": rng.normal(size=(64, 12)), "clip": patches}
                arrays = {name: value.astype(np.float32) for name, value in arrays.items()}
                name = source.format(scene.key)
                writer.add(split, scene.key, arrays, scene.caption, name, out.getvalue())
    return folder


@pytest.mark.parametrize(
    ("data", "source", "told"),
    [
        ("demo_masked", "scene:{}", True),
        ("demo", "scene:{}", False),
        ("demo_masked", "{}.jpg", False),
    ],
)
def test_masked_scenes_alone_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str, source: str, told: bool
) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / "home"))
    if told:
        small_reader(fits())
    store = scene_store(tmp_path / "store", source)
    config = small_config()
    config.data.name, config.data.tokens = data, str(store)
    run = make_run(tmp_path / "run", store, config)
    result = evaluate(EvaluateConfig(str(run), device="cpu", batch_size=8, **FEW))  # type: ignore[arg-type]
    block = result["drawings"].get("hidden_half")
    assert (block is not None) == told
    assert ("The hidden half" in (run / "report.html").read_text("utf-8")) == told
    if block is None:
        return
    assert set(block["shares"]) == {"true", "mean", "euler-2", "mean_token", "ridge"}
    for shares in block["shares"].values():
        assert set(shares) == {"digit", "nothing", "specks"}
        assert sum(shares.values()) == pytest.approx(1)
    assert block["draws"]["samples"] == 4
    assert block["draws"]["images"] == 8
    assert 1 <= block["draws"]["different_halves"] <= 4
    assert torch.isfinite(torch.tensor(block["reader_on_true_tokens"]["digit"]))
