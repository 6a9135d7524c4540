"""An evaluation against known laws: the optimum, ridge, the mean token, equal estimators."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import make_run, small_config
from safetensors.torch import save_file

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.evaluate import open_readers
from blip3o_lit.inference import load
from blip3o_lit.scoring import Scorer, check_finite, verdict, verdict_note
from blip3o_lit.tokens.shards import ArraySpec, TokenWriter


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("made") / "run")


def scored(run: Path, folder: Path, **settings) -> tuple[dict, list[str]]:
    config = EvaluateConfig(ckpt=str(run), device="cpu", **settings)
    loaded = load(run)
    told: list[str] = []
    readers = open_readers(loaded, config)
    scorer = Scorer(loaded, *readers, config, folder, lambda what, done, total: told.append(what))
    return scorer.run(), told


@pytest.fixture(scope="module")
def result(run, home) -> dict:
    settings = {"solvers": ["euler-1", "heun-3"], "curve": ["euler-1", "euler-2", "rk4-1"]}
    return scored(run, home / "fits", baselines="all", curve_images=20, **settings)[0]


def test_optimum_and_baselines_meet_their_laws(result):
    best = result["optimum"]
    assert best["mean"]["mse"] == pytest.approx(best["mean"]["expected_mse"], rel=0.1)
    assert best["sample"]["mse"] == pytest.approx(best["sample"]["expected_mse"], rel=0.1)
    assert best["sample"]["expected_mse"] == 2 * best["mean"]["expected_mse"]
    base = result["baselines"]
    # The problem is linear, so ridge estimates the posterior mean itself.
    assert base["ridge"]["mse"] == pytest.approx(best["mean"]["mse"], rel=0.02)
    assert base["mean_token"]["r2"] == pytest.approx(0, abs=0.05)
    assert base["mean_token"]["cosine_centred"] == 0
    assert base["ridge"]["cosine"] <= best["mean"]["cosine"] + 0.003
    assert base["mlp"]["cosine"] < base["ridge"]["cosine"]
    assert set(base) == {"mean_token", "ridge", "mlp", "regression"}


def test_one_euler_step_is_the_mean_for_the_same_images(result):
    assert result["estimators"]["mean"]["nfe"] == 1
    assert result["estimators"]["euler-1"]["nfe"] == 1
    mean, euler = (result["estimators"][name] for name in ("mean", "euler-1"))
    for name in ("cosine", "mse", "frechet", "norm_ratio"):
        assert euler[name] == pytest.approx(mean[name], rel=1e-4)


def test_curve_counts_evaluations_and_images(result):
    points = [(point["solver"], point["nfe"], point["images"]) for point in result["nfe_curve"]]
    assert points == [("euler", 1, 20), ("euler", 2, 20), ("rk4", 1, 20)]


def test_contract_keys(result):
    assert result["split"] == "validation"
    assert result["images"] == 48
    assert np.shape(result["position_cosine"]) == (4, 4)
    assert len(result["checkpoint"]) == len(result["tokens"]) == 64
    scores = set(result["estimators"]["mean"])
    named = "cosine cosine_ci95 cosine_centred cosine_pooled cosine_cls image_std p5 p50 p95"
    named += " above_0.7 above_0.8 above_0.9 mse r2 norm_ratio frechet nfe"
    assert set(named.split()) <= scores
    assert result["frechet_floor"]["images_a_half"] == 24


def test_fits_are_found_again_and_differ_by_settings(run, home, result):
    few = {"solvers": [], "curve": [], "images": 8}
    again, told = scored(run, home / "fits", baselines="all", **few)
    assert set(told) == {"scoring"}
    files = len(list((home / "fits").glob("*.safetensors")))
    assert files == 4
    other, told = scored(run, home / "fits", baselines="cheap", baseline_images=100, **few)
    assert "ridge" in told
    assert other["baselines"]["ridge"]["mse"] > again["baselines"]["ridge"]["mse"]


def test_a_subset_scores_what_its_images_score_alone(run, home):
    few = {"baselines": "none", "solvers": ["heun-3"], "curve": []}
    small = scored(run, home / "fits", images=8, batch_size=3, **few)[0]
    large = scored(run, home / "fits", images=8, batch_size=8, **few)[0]
    for name in ("mean", "heun-3"):
        first, second = (report["estimators"][name]["cosine"] for report in (small, large))
        assert first == pytest.approx(second, rel=1e-6)


def test_training_images_are_labelled(run, home):
    few = {"baselines": "cheap", "solvers": [], "curve": [], "images": 8}
    report = scored(run, home / "fits", same_data=True, **few)[0]
    assert report["split"] == "train"
    blocks = [*report["estimators"].values(), *report["baselines"].values()]
    assert {block["split"] for block in blocks} == {"train"}
    assert "train images" in report["verdict_note"]


def test_unknown_split_and_other_tokens_are_refused(run, home, tmp_path):
    with pytest.raises(UserError, match="validation"):
        scored(run, home / "fits", split="validatoin")
    other = token_store(tmp_path / "other", grid=3)
    config = EvaluateConfig(ckpt=str(run), split="test")
    config.data.tokens = str(other)
    with pytest.raises(UserError, match="was trained on"):
        open_readers(load(run), config)


def token_store(folder: Path, grid: int = 4, splits: tuple[str, ...] = ("test",)) -> Path:
    """CLS and patches whose head gives each image its own caption's embedding."""
    tokens = grid * grid + 1
    eva = ArraySpec("tokens", "float16", (tokens, 6), True, (grid, grid), "eva")
    clip = ArraySpec("tokens", "float16", (tokens, 4), True, (grid, grid), "tower")
    text = ArraySpec("text", "float16", (4,), tower="tower")
    draws = np.random.default_rng(0)
    projection = draws.normal(size=(4, 4))
    with TokenWriter(folder, {"eva": eva, "clip": clip, "text": text}, 8) as writer:
        for split in splits:
            for number in range(16):
                values = draws.normal(size=(tokens, 4))
                embedding = values[0] @ projection
                arrays = {"eva": draws.normal(size=(tokens, 6)), "clip": values}
                arrays["text"] = embedding / np.linalg.norm(embedding)
                writer.add(split, f"{number:04d}", arrays, caption=f"number {number}")
    save_file({"clip.projection": torch.tensor(projection).float()}, folder / "heads.safetensors")
    return folder


def test_retrieval_of_true_tokens_and_of_constants(home, tmp_path):
    store = token_store(tmp_path / "store", splits=("train", "validation"))
    config = small_config()
    config = replace(config, mode=ModeConfig("cls_patch"))
    config = replace(config, data=replace(config.data, name="tokens", tokens=str(store)))
    run = make_run(tmp_path / "run", store, config)
    report = scored(run, home / "fits", solvers=[], curve=[])[0]
    recalls = report["retrieval"]
    assert recalls["read_out"] == "cls"
    assert recalls["true"]["image_to_text"]["R@1"] == 1
    assert recalls["true"]["text_to_image"]["R@1"] == 1
    assert recalls["chance"]["image_to_text"]["R@5"] == pytest.approx(5 / 16)
    assert recalls["mean_token"]["text_to_image"]["R@5"] == pytest.approx(5 / 16)
    assert recalls["generated"]["image_to_text"]["R@1"] < 0.5
    assert report["estimators"]["mean"]["cosine_cls"] is not None


def test_without_a_train_split_only_baselines_none_works(run, home, tmp_path):
    store = token_store(tmp_path / "held", splits=("validation",))
    for baselines, message in (("cheap", "no train split"), ("none", "")):
        settings = {"baselines": baselines, "solvers": [], "curve": []}
        config = EvaluateConfig(ckpt=str(run), device="cpu", **settings)
        config.data.tokens = str(store)
        loaded = load(run)
        readers = open_readers(loaded, config)
        if message:
            with pytest.raises(UserError, match=message):
                Scorer(loaded, *readers, config, home / "fits", lambda *_: None)
            continue
        report = Scorer(loaded, *readers, config, home / "fits", lambda *_: None).run()
        assert "no baseline was fitted" in report["verdict_note"]


def test_verdicts_stand_beside_the_baselines():
    words = [verdict(cosine) for cosine in (0.29, 0.3, 0.6, 0.8)]
    assert words == ["failing", "works", "good", "excellent"]
    report = {
        "headline": "mean",
        "images": 3,
        "split": "validation",
        "estimators": {"mean": {"cosine": 0.85}},
        "baselines": {"mean_token": {"cosine": 0.9}, "ridge": {"cosine": 0.8}},
    }
    assert "not above mean_token" in verdict_note(report)
    report["estimators"]["mean"]["cosine"] = 0.95
    assert "above every baseline" in verdict_note(report)


def test_numbers_that_are_not_finite_name_their_place():
    with pytest.raises(UserError, match=r"estimators\.heun-10\.mse is nan"):
        check_finite({"estimators": {"heun-10": {"mse": float("nan")}}}, "")
