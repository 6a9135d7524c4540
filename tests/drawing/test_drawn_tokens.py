"""Tokens are drawn by generate, from Python and behind an export, by read-out or by decoder."""

from __future__ import annotations

import io
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_run import TRAIN, VALIDATION, picture_store, run_on
from PIL import Image
from small_decoder import saved, spec

from blip3o_lit.config.commands import ExportConfig, GenerateConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.drawing.decoder import load_decoder
from blip3o_lit.drawing.drawer import READOUT_FILE
from blip3o_lit.drawing.sheet import image_of
from blip3o_lit.evaluate import evaluate
from blip3o_lit.export import export
from blip3o_lit.generate import generate
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

DINO = replace(spec(), dtype="float32", shape=(16, 64), cls=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_store(tmp_path_factory.mktemp("pictures"))


def drawn(run: Path, store: Path, out: Path, **settings: Any) -> dict[str, Path]:
    config = GenerateConfig(str(run), str(store), str(out), device="cpu", draw=True, **settings)
    folder = generate(config) / "drawings"
    return {f"{path.parent.name}/{path.stem}": path for path in folder.rglob("*.png")}


def test_generate_writes_a_picture_beside_each_sample(store: Path, tmp_path: Path) -> None:
    run = run_on(store, tmp_path / "run")
    files = drawn(run, store, tmp_path / "out", batch_size=5)
    assert len(files) == TRAIN + VALIDATION
    tokens = TokenReader(TokenStore.open(tmp_path / "out"), "validation", "clip", "clip")
    assert tokens.keys(np.array([3])) == ["051"]
    expected = BLIP3oInference(run, "cpu").draw(tokens.read(np.array([3]))["target"])[0]
    found = Image.open(files["validation-000000/051"])
    assert found.size == expected.size == (128, 128)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1


def test_drawing_goes_on_where_it_was_and_can_be_asked_for_later(
    store: Path, tmp_path: Path
) -> None:
    run, out = run_on(store, tmp_path / "run"), tmp_path / "out"
    generate(GenerateConfig(str(run), str(store), str(out), device="cpu"))
    assert not (out / "drawings").exists()
    files = drawn(run, store, out)
    whole = {name: path.read_bytes() for name, path in files.items()}
    lost = out / "drawings" / "train-000001"
    half = lost.rename(lost.with_name(".train-000001"))
    (half / "017.png").unlink()
    kept = files["train-000000/000"].stat().st_mtime_ns
    files = drawn(run, store, out)
    assert {name: path.read_bytes() for name, path in files.items()} == whole
    assert files["train-000000/000"].stat().st_mtime_ns == kept


def test_true_tokens_are_drawn_near_their_pictures(store: Path, tmp_path: Path) -> None:
    model = BLIP3oInference(run_on(store, tmp_path / "run"), "cpu")
    held = TokenReader(TokenStore.open(store), "validation")
    tokens = held.read(np.arange(2))["target"]
    both = model.draw(tokens)
    (alone,) = model.draw(tokens[1].numpy())
    assert np.abs(np.asarray(both[1], int) - np.asarray(alone, int)).max() <= 1
    true = Image.open(io.BytesIO(held.thumbnails(np.array([1]))[0])).resize((128, 128), 0)
    assert np.abs(np.asarray(alone, float) - np.asarray(true, float)).mean() < 8
    with pytest.raises(UserError, match=r"tokens are \[2, 16, 6\], expected \[B, 16, 12\]"):
        model.draw(torch.zeros(2, 16, 6))
    copy = pickle.loads(pickle.dumps(model))  # noqa: S301 (our own)
    assert len(copy.draw(tokens)) == 2


def test_the_read_out_travels_with_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = picture_store(tmp_path / "store")
    run = run_on(store, tmp_path / "run")
    tokens = TokenReader(TokenStore.open(store), "validation").read(np.arange(2))["target"]
    before = BLIP3oInference(run, "cpu").draw(tokens)
    export(ExportConfig(str(run), str(tmp_path / "export")))
    assert (tmp_path / "export" / READOUT_FILE).is_file()
    shutil.rmtree(store)
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / "elsewhere"))
    after = BLIP3oInference(tmp_path / "export", "cpu").draw(tokens)
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))
    (tmp_path / "export" / READOUT_FILE).write_bytes(b"broken")
    with pytest.raises(UserError, match=r"readout.safetensors is damaged or of other tokens"):
        BLIP3oInference(tmp_path / "export", "cpu").draw(tokens)


def test_without_pictures_drawing_is_refused_in_one_line(tmp_path: Path) -> None:
    store = picture_store(tmp_path / "store", thumbnails=False)
    run = run_on(store, tmp_path / "run")
    with pytest.raises(UserError, match=r"no thumbnails here: give decoder="):
        drawn(run, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoder": "rae", "tokens": "a", "out": "b"}, "draws nothing without draw=true"),
        ({"draw": True, "images": "a", "captions": "b"}, "give tokens= and out="),
    ],
)
def test_keys_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        GenerateConfig("run", **settings)


def test_a_decoder_draws_in_every_command(tmp_path: Path) -> None:
    """Its tower's tokens without thumbnails: nothing but the decoder is needed."""
    saved(tmp_path / "rae")
    store = picture_store(tmp_path / "store", thumbnails=False, target=DINO)
    run, decoder = run_on(store, tmp_path / "run"), str(tmp_path / "rae")
    few: dict[str, Any] = {"solvers": ["euler-2"], "curve": [], "samples": 0, "device": "cpu"}
    result = evaluate(EvaluateConfig(str(run), decoder=decoder, drawn_images=4, **few))
    assert result["drawings"]["by"] == decoder
    assert "ceiling" not in result["drawings"]
    assert "psnr" in result["estimators"]["mean"]
    assert "psnr_thumbnail" not in result["estimators"]["mean"]
    labels = [drawing["label"] for drawing in result["drawings"]["rows"][0]["drawings"]]
    assert labels == ["true tokens", "mean", "sample 1", "sample 2"]
    files = drawn(run, store, tmp_path / "out", decoder=decoder, split="validation")
    assert len(files) == VALIDATION
    tokens = TokenReader(TokenStore.open(store), "validation").read(np.arange(1))["target"]
    model = BLIP3oInference(run, "cpu")
    (picture,) = model.draw(tokens, decoder)
    expected = load_decoder(decoder, DINO, model.shape.target).draw(tokens)[0]
    assert np.array_equal(np.asarray(picture), np.asarray(image_of(expected)))


def test_the_decoder_of_another_tower_is_refused_by_every_command(
    store: Path, tmp_path: Path
) -> None:
    saved(tmp_path / "rae")
    run, decoder = run_on(store, tmp_path / "run"), str(tmp_path / "rae")
    message = "draws tokens of dinov2 with registers; these are of clip-test"
    with pytest.raises(UserError, match=message):
        drawn(run, store, tmp_path / "out", decoder=decoder)
    with pytest.raises(UserError, match=message):
        evaluate(EvaluateConfig(str(run), decoder=decoder, device="cpu"))
    with pytest.raises(UserError, match=message):
        BLIP3oInference(run, "cpu").draw(torch.zeros(1, 16, 12), decoder)
