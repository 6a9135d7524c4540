"""Runs on stored words: what is scored beside them, generated from them, and said of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import make_run, small_config
from small_store import CLIP, EVA
from small_words import write_words

from blip3o_lit.budget.forecast import forecast
from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.commands import GenerateConfig
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.evaluation.baselines import BaselineFits
from blip3o_lit.evaluation.readers import open_readers, trained_images
from blip3o_lit.generate import generate
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

BOTH = ["eva", "words"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    write_words(folder, train=40, validation=12, grids={"eva": EVA, "clip": CLIP})
    return folder


def config_of(store: Path, condition: object) -> TrainConfig:
    config = small_config()
    data = DataConfig(name="tokens", tokens=str(store), condition=condition)
    return replace(config, data=data, model=replace(config.model, conditioning="cross"))


def run_of(folder: Path, store: Path, condition: object) -> Path:
    return make_run(folder, store, config_of(store, condition))


def scored(run: Path, **changes: object) -> EvaluateConfig:
    quick = {"baselines": "all", "baseline_steps": 2, "solvers": ["euler-2"], "curve": []}
    return EvaluateConfig(ckpt=str(run), device="cpu", **{**quick, **changes})  # type: ignore[arg-type]


def test_baselines_of_grids_read_the_grid_of_a_joined_condition(
    store: Path, tmp_path: Path
) -> None:
    fits = {}
    for name, condition in (("joined", BOTH), ("grid", "eva")):
        run = run_of(tmp_path / name, store, condition)
        loaded, config = load(run), scored(run)
        held, train = open_readers(loaded, config)
        assert train is not None
        fits[name] = BaselineFits(train, loaded, config, tmp_path / name, lambda *_: None)
        if name == "joined":
            assert trained_images(loaded, held) == 0
    for name in ("ridge", "mlp"):
        one, other = (fits[run].get(name).state_dict() for run in ("joined", "grid"))
        assert one.keys() == other.keys()
        for key in one:
            assert torch.equal(one[key], other[key])
    result = evaluate(scored(tmp_path / "joined"))
    assert result["baselines"].keys() == {"mean_token", "ridge", "mlp", "regression"}
    assert "left_out" not in result


def test_words_alone_leave_out_what_reads_a_grid(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", store, "words")
    result = evaluate(scored(run))
    assert result["baselines"].keys() == {"mean_token", "regression"}
    assert result["left_out"] == ["ridge", "mlp"]
    assert "left out: ridge, mlp, which read a grid" in capsys.readouterr().out
    assert np.isfinite(result["swapped"]["random_pairs"])


def test_tokens_are_generated_from_the_first_captions(store: Path, tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", store, "words")
    heun = SolverConfig("heun", 2)
    for name, size in (("a", 5), ("b", 7)):  # padded otherwise, the same but for rounding
        out = str(tmp_path / name)
        generate(
            GenerateConfig(
                ckpt=str(run),
                tokens=str(store),
                out=out,
                batch_size=size,
                solver=heun,
                device="cpu",
            )
        )
    ids = np.arange(12)
    a, b = (
        TokenReader(TokenStore.open(tmp_path / name), "validation", "clip", "clip").read(ids)
        for name in "ab"
    )
    torch.testing.assert_close(a["target"], b["target"], rtol=2e-3, atol=2e-3)
    loaded = load(run)
    condition = TokenReader(TokenStore.open(store), "validation", "words").read(ids)["condition"]
    tokens = loaded.translator.generate(condition, torch.from_numpy(ids), 0, heun).x1_BND
    torch.testing.assert_close(a["target"].float(), tokens, rtol=2e-3, atol=2e-3)
    other = tmp_path / "grids"
    write_words(other, 5, 5, grids={"eva": EVA})
    generate(
        GenerateConfig(ckpt=str(run), tokens=str(other), out=str(tmp_path / "c"), device="cpu")
    )
    bare = tmp_path / "bare"
    write_words(bare, 5, 5, grids={})
    with pytest.raises(UserError, match="the store has words alone"):
        generate(
            GenerateConfig(ckpt=str(run), tokens=str(bare), out=str(tmp_path / "d"), device="cpu")
        )


def test_a_plan_says_how_long_captions_are(store: Path) -> None:
    config = config_of(store, BOTH)
    data = TokenDataModule(config.data, config.mode, store, 0, config.batch_size)
    data.open()
    rows = dict(forecast(config, data, 30))
    mean = data.train.mean_length
    assert 1 < mean < 9
    assert rows["words"] == (
        f"{mean:.1f} tokens a caption on average, 9 at most: {mean / 100:.1f} kB and 0.1 kB"
    )
    grids = EVA.nbytes + CLIP.nbytes
    assert data.train.sample_bytes == grids + int(mean * 10)


def test_an_export_says_whose_words_it_reads(store: Path, tmp_path: Path) -> None:
    from blip3o_lit.checkpoints.export import write_export

    run = run_of(tmp_path / "run", store, BOTH)
    write_export(load(run), tmp_path / "out")
    arrays = json.loads((tmp_path / "out" / "config.json").read_text())["arrays"]
    assert arrays["words"]["tower"] == "text-test"
    assert {side: entry["kind"] for side, entry in arrays.items()} == {
        "condition": "tokens",
        "words": "sequence",
        "target": "tokens",
    }
    assert load(tmp_path / "out").shape == load(run).shape
