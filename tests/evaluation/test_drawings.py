"""Drawn tokens in an evaluation: the read-out knows training images alone; its ceiling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_run import TRAIN, VALIDATION, picture_store, run_on

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.drawing.drawer import READOUT_FILE, kept_readout, split_readout
from blip3o_lit.drawing.readout import psnr
from blip3o_lit.evaluate import evaluate
from blip3o_lit.report.captions import PICTURE
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore


def scored(run: Path, **settings: Any) -> dict[str, Any]:
    few: dict[str, Any] = {"solvers": ["euler-2"], "curve": [], "samples": 2, "device": "cpu"}
    return evaluate(EvaluateConfig(str(run), batch_size=8, **(few | settings)))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture_store(tmp_path_factory.mktemp("pictures"))


def test_every_score_has_its_psnr_and_the_file_its_ceiling(store: Path, tmp_path: Path) -> None:
    run = run_on(store, tmp_path / "run")
    result = scored(run, drawn_images=10)
    facts = result["drawings"]
    assert facts["images"] == 10
    assert facts["ceiling"] > 32
    for scores in (*result["estimators"].values(), *result["baselines"].values()):
        assert scores["psnr"] < 40
        assert scores["psnr_thumbnail"] < facts["ceiling"]
    readers = {s: TokenReader(TokenStore.open(store), s) for s in ("train", "validation")}
    readout = kept_readout(run, readers["train"].shape.target)
    assert readout is not None
    # Every image by hand: the ten are spread over the sixteen.
    ids = np.unique(np.linspace(0, VALIDATION - 1, 10).round().astype(int))
    batch = readers["validation"].read(ids)
    true = readout.draw(batch["target"])
    mean = readers["train"].read(np.arange(TRAIN))["target"].mean(0, keepdim=True)
    by_hand = psnr(readout.draw(mean).expand_as(true), true).mean()
    assert result["baselines"]["mean_token"]["psnr"] == pytest.approx(float(by_hand), abs=0.02)


def test_rows_show_best_median_and_worst_with_their_cosines(store: Path, tmp_path: Path) -> None:
    result = scored(run_on(store, tmp_path / "run"))
    rows = result["drawings"]["rows"]
    assert [row["title"].split(":")[0] for row in rows] == [
        *("best", "best", "median", "median", "worst", "worst")
    ]
    labels = ["picture", "true tokens", "mean", "sample 1", "sample 2"]
    for row in rows:
        assert [drawing["label"] for drawing in row["drawings"]] == labels
        assert all(PICTURE.fullmatch(drawing["picture"]) for drawing in row["drawings"])
        assert ["cosine" in drawing for drawing in row["drawings"]] == [False] * 2 + [True] * 3
    # The headline's cosine of the worst image is the one that it was ranked by.
    worst = rows[-2]
    assert worst["title"] == f"worst: {result['worst'][0]['key']}"
    assert worst["drawings"][2]["cosine"] == pytest.approx(result["worst"][0]["cosine"], abs=1e-4)
    samples = [drawing["picture"] for drawing in worst["drawings"][3:]]
    assert samples[0] != samples[1]


def test_validation_images_have_no_part_in_the_read_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores that differ in validation alone, pictures and tokens, give the same tensors."""
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / "home"))
    other = picture_store(tmp_path / "other", seed=1, turned=True)
    fits = []
    for number, folder in enumerate((store, other)):
        run = run_on(folder, tmp_path / f"run-{number}")
        result = scored(run)
        fitted = kept_readout(run, TokenReader(TokenStore.open(folder), "train").shape.target)
        assert fitted is not None
        fits.append((result, fitted.state_dict()))
    (honest, one), (turned, two) = fits
    assert all(torch.equal(one[name], two[name]) for name in one)
    # Had it learnt from validation images, it would draw the turned tokens as well.
    assert honest["drawings"]["ceiling"] > 32
    assert turned["drawings"]["ceiling"] < 20


def test_a_second_evaluation_finds_the_read_out(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / "home"))
    first = scored(run_on(store, tmp_path / "run"))
    (file,) = (tmp_path / "home" / "baselines").glob("readout-*")
    made = file.stat().st_mtime_ns
    second = scored(run_on(store, tmp_path / "again"))
    assert file.stat().st_mtime_ns == made
    assert second["drawings"] == first["drawings"]
    train = TokenReader(TokenStore.open(store), "train")
    split_readout(train, tmp_path / "home" / "baselines")
    assert len(list((tmp_path / "home" / "baselines").glob("readout-*"))) == 1


@pytest.mark.parametrize(
    ("thumbnails", "settings", "reason"),
    [(False, {}, "no thumbnails"), (True, {"drawn_images": 0}, "drawn_images=0")],
)
def test_where_nothing_is_drawn_the_file_says_so_once(
    thumbnails: bool, settings: dict[str, int], reason: str, tmp_path: Path
) -> None:
    run = run_on(picture_store(tmp_path / "s", thumbnails=thumbnails), tmp_path / "run")
    result = scored(run, **settings)
    text = (run / "evaluation.json").read_text()
    assert list(result["drawings"]) == ["why_not"]
    assert reason in result["drawings"]["why_not"]
    del result["overrides"]
    assert json.dumps(result).count(reason) == 1
    assert "psnr" not in text
    assert not (run / READOUT_FILE).exists()


def test_a_negative_number_of_images_is_refused() -> None:
    with pytest.raises(UserError, match="drawn_images=-1 must be 0 or more"):
        EvaluateConfig("run", drawn_images=-1)


def test_the_file_is_json_of_finite_numbers(store: Path, tmp_path: Path) -> None:
    run = run_on(store, tmp_path / "run")
    result = scored(run, drawn_images=3)
    assert json.loads((run / "evaluation.json").read_text()) == json.loads(json.dumps(result))
