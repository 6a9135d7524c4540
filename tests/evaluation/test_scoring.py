"""An evaluation against known laws: the optimum, ridge, the mean token, equal estimators."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import make_run, small_config
from safetensors.torch import save_file

from blip3o_lit.base.files import sha256_of
from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.solver import solver_from_label
from blip3o_lit.evaluation.estimators import exact_estimators, known_problem
from blip3o_lit.evaluation.forecast import phase_seconds
from blip3o_lit.evaluation.probes import swapped
from blip3o_lit.evaluation.readers import open_readers
from blip3o_lit.evaluation.score import Scorer
from blip3o_lit.evaluation.verdict import check_finite, standing, verdict, verdict_note
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter


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
    settings = {"solvers": ["heun-3", "euler-1"], "curve": ["euler-1", "euler-2", "rk4-1"]}
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


def test_solvers_may_take_fewer_images_than_the_mean(run, home, result):
    settings = {"solvers": ["heun-3"], "curve": [], "samples": 0, "batch_size": 7}
    few = scored(run, home / "fits", images=20, **settings)[0]
    both = scored(run, home / "fits", solver_images=20, **settings)[0]
    assert (both["images"], both["estimators"]["mean"]["images"]) == (48, 48)
    heun, alone = (scores["estimators"]["heun-3"] for scores in (both, few))
    assert heun["images"] == 20
    for name in ("cosine", "mse", "frechet", "norm_ratio"):
        assert heun[name] == pytest.approx(alone[name], rel=1e-5)
        mean = result["estimators"]["mean"][name]
        assert both["estimators"]["mean"][name] == pytest.approx(mean, rel=1e-5)
    assert heun["floor_frechet"] == pytest.approx(few["frechet_floor"]["frechet"])
    assert both["against"]["heun-3"]["ridge"] == few["against"]["heun-3"]["ridge"]


def test_curve_counts_evaluations_and_images(result):
    points = [(point["solver"], point["nfe"], point["images"]) for point in result["nfe_curve"]]
    assert points == [("euler", 1, 20), ("euler", 2, 20), ("rk4", 1, 20)]


def test_no_evaluation_is_computed_twice(run, home):
    """One encoded condition per batch, one first output for all, and no solver run again."""
    settings = {"solvers": ["heun-3", "ab2-2"], "curve": ["euler-1", "heun-3", "euler-2"]}
    settings |= {"images": 8, "curve_images": 8, "sample_images": 8, "samples": 3}
    config = EvaluateConfig(ckpt=str(run), device="cpu", baselines="none", **settings)
    loaded = load(run)
    scorer = Scorer(loaded, *open_readers(loaded, config), config, home / "fits", lambda *_: None)
    network, calls = loaded.translator.network, {"outputs": 0, "conditions": 0}
    encode = network.encode
    network.encode = lambda condition: (
        calls.update(conditions=calls["conditions"] + 1) or encode(condition)
    )
    network.register_forward_hook(lambda *_: calls.update(outputs=calls["outputs"] + 1))
    drawings = scorer.drawings
    assert drawings.drawer is None  # a testbed has no pictures, whose samples would be drawn again
    result = scorer.run()
    assert [block["nfe"] for block in result["estimators"].values()] == [1, 5, 2]
    assert [point["nfe"] for point in result["nfe_curve"]] == [1, 5, 2]
    own_condition = 1 + 4 + 1 + 1 + 2 * 4  # mean, heun-3, ab2-2, euler-2, and two more draws
    swapped = 1 + 4 + 1
    warm, bins, coverage = 1, 8, 0
    assert calls["outputs"] == warm + own_condition + swapped + bins + coverage
    assert calls["conditions"] == warm + 3


def test_sharing_changes_no_number(run, home):
    """Scores beside those taken alone."""
    settings = {"curve": [], "samples": 0, "baselines": "none", "images": 16}
    both = scored(run, home / "fits", solvers=["heun-3", "euler-3"], **settings)[0]
    for label in ("heun-3", "euler-3"):
        alone = scored(run, home / "fits", solvers=[label], **settings)[0]
        block, own = both["estimators"][label], alone["estimators"][label]
        changing = {"seconds_per_image"}
        assert {k: block[k] for k in block.keys() - changing} == {
            k: own[k] for k in own.keys() - changing
        }


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


def test_exact_estimators_have_the_true_geometry_and_realism(result):
    best, floor = result["optimum"], result["frechet_floor"]
    # A sample is as far from the truth as two halves are; the mean lacks the unexplained part.
    assert best["sample"]["frechet_token"] < 3 * floor["frechet_token"]
    assert best["mean"]["frechet_token"] > 5 * best["sample"]["frechet_token"]
    assert best["mean"]["cka_token"] > best["sample"]["cka_token"] > 0.3
    assert abs(result["baselines"]["mean_token"]["cka_token"] or 0) < 0.1
    shares = [row["share"] for row in best["mean"]["cosine_by_norm"]]
    assert sum(shares) == pytest.approx(1)


def test_worst_images_are_the_lowest_first(result):
    worst = result["worst"]
    assert len(worst) == 1
    assert worst[0]["cosine"] == pytest.approx(result["estimators"]["mean"]["min"])


def test_loss_by_time_of_a_network_that_says_nothing_is_that_of_the_target(run, home):
    config = EvaluateConfig(ckpt=str(run), device="cpu", baselines="none", solvers=[], curve=[])
    loaded = load(run)
    with torch.no_grad():
        for weight in loaded.translator.network.parameters():
            weight.zero_()
    held, train = open_readers(loaded, config)
    bins = Scorer(loaded, held, train, config, home / "fits", lambda *_: None).run()["time_bins"]
    assert [row["t"] for row in bins] == [[n / 8, (n + 1) / 8] for n in range(8)]
    x1 = loaded.translator.target_standardizer.standardise(held.read(np.arange(48))["target"])
    assert loaded.config.flow.prediction == "sample"
    for row in bins:  # the output is 0 and its target is x1, at every time
        assert row["loss"] == pytest.approx(float(x1.square().mean()), rel=1e-5)
        assert row["norm_ratio"] == 0
    # Implied velocity -x_t / (1 - t) against x1 - z: by chance aligned with the noise alone.
    assert bins[0]["velocity_cosine"] > bins[-1]["velocity_cosine"]


def test_swapped_conditions_cost_what_the_condition_gave(result):
    swapped, base = result["swapped"], result["baselines"]
    assert swapped["images"] == 20
    # Tokens of two images share nothing but the mean.
    assert swapped["random_pairs"] < 0.2
    assert swapped["random_pairs"] < base["ridge"]["cosine"] - 0.3


def test_the_exact_posterior_mean_with_swapped_conditions_is_a_random_pair(run, home):
    config = EvaluateConfig(ckpt=str(run), device="cpu", baselines="none", solvers=[], curve=[])
    held, _ = open_readers(load(run), config)
    problem = known_problem(held)
    assert problem is not None
    batch = held.read(np.arange(48))
    whole = batch["condition"], batch["target"], torch.arange(48)
    found = swapped(exact_estimators(problem), [whole])
    assert found["mean"] == pytest.approx(found["random_pairs"], abs=0.05)
    assert found["sample"] == pytest.approx(found["random_pairs"], abs=0.05)


def test_each_estimator_is_compared_with_each_baseline_image_by_image(result):
    cosine = {name: block["cosine"] for name, block in result["baselines"].items()}
    for name, rows in result["against"].items():
        assert set(rows) == set(cosine)
        for baseline, found in rows.items():
            expected = result["estimators"][name]["cosine"] - cosine[baseline]
            assert found["difference"] == pytest.approx(expected, abs=1e-9)


def test_samples_have_noise_of_their_own(result):
    samples = result["samples"]
    assert (samples["solver"], samples["samples"], samples["images"]) == ("heun-3", 4, 16)
    assert samples["pairwise_cosine"] < 0.99
    assert samples["mse_ratio"] > 1


def test_a_checkpoint_is_as_good_as_itself_and_tokens_of_another_seed_are_not_it(run, home):
    config = EvaluateConfig(ckpt=str(run), device="cpu", baselines="none", solvers=[], curve=[])
    loaded = load(run)
    readers = open_readers(loaded, config)
    rival = load(run)
    same = Scorer(loaded, *readers, config, home / "fits", lambda *_: None, rival).run()
    assert same["paired"]["cosine"]["mean"]["difference"] == 0
    assert same["paired"]["cosine"]["mean"]["p_value"] == 1
    with torch.no_grad():
        for weight in rival.translator.network.parameters():
            weight.zero_()  # the mean token: better than random weights
    other = Scorer(loaded, *readers, config, home / "fits", lambda *_: None, rival).run()
    assert other["paired"]["cosine"]["mean"]["difference"] < 0
    assert other["paired"]["cosine"]["mean"]["p_value"] < 0.01


def test_a_checkpoint_that_its_run_replaces_meanwhile_is_the_one_that_was_scored(
    run, home, tmp_path
):
    copy = shutil.copytree(run, tmp_path / "run")
    asked = {"solvers": ["fitted-2"], "curve": [], "images": 8, "curve_images": 2}
    config = EvaluateConfig(ckpt=str(copy), device="cpu", baselines="none", **asked)
    loaded, rival = load(copy), load(copy)
    expected, content = sha256_of(loaded.file), load(copy).content
    scorer = Scorer(
        loaded, *open_readers(loaded, config), config, home / "fits", lambda *_: None, rival
    )
    loaded.file.unlink()
    result = scorer.run()
    assert (result["checkpoint"], result["paired"]["checkpoint"]) == (expected, expected)
    assert scorer.content == content


def test_weights_that_are_not_finite_name_their_estimator(run, home):
    config = EvaluateConfig(ckpt=str(run), device="cpu", baselines="none", solvers=[], curve=[])
    loaded = load(run)
    next(loaded.translator.network.parameters()).fill_(float("nan"))
    readers = open_readers(loaded, config)
    with pytest.raises(UserError, match="mean generates tokens that are not finite"):
        Scorer(loaded, *readers, config, home / "fits", lambda *_: None).run()


def test_fits_are_found_again_and_differ_by_settings(run, home, result):
    few = {"solvers": [], "curve": []}
    again, told = scored(run, home / "fits", baselines="all", **few)
    assert set(told) == {"scoring", "loss by time", "swapped conditions"}
    files = len(list((home / "fits").glob("*.safetensors")))
    assert files == 4
    other, told = scored(run, home / "fits", baselines="cheap", baseline_images=100, **few)
    assert "ridge" in told
    assert other["baselines"]["ridge"]["mse"] > again["baselines"]["ridge"]["mse"]


def test_a_damaged_fit_is_named(run, home, result, tmp_path):
    fits = Path(shutil.copytree(home / "fits", tmp_path / "fits"))
    ridge = next(fits.glob("ridge-*.safetensors"))
    ridge.write_bytes(ridge.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"ridge-\w+\.safetensors is damaged: delete it"):
        scored(run, fits, solvers=[], curve=[], images=8)


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


def token_store(
    folder: Path, grid: int = 4, splits: tuple[str, ...] = ("test",), seed: int = 0
) -> Path:
    """CLS and patches; a caption's embedding is its image's, and patches tell of CLS linearly."""
    tokens = grid * grid + 1
    eva = ArraySpec("tokens", "float16", (tokens, 6), True, (grid, grid), "eva")
    clip = ArraySpec("tokens", "float16", (tokens, 4), True, (grid, grid), "tower")
    text = ArraySpec("text", "float16", (4,), tower="tower")
    draws = np.random.default_rng(seed)
    projection, hidden = draws.normal(size=(2, 4, 4))
    with TokenWriter(folder, {"eva": eva, "clip": clip, "text": text}, 32) as writer:
        for split in splits:
            for number in range(64 if split == "train" else 16):
                values = 0.02 * draws.normal(size=(tokens, 4))
                values += draws.normal(size=4)
                values[1:] = values[1:] @ hidden
                embedding = values[0] @ projection
                arrays = {"eva": draws.normal(size=(tokens, 6)), "clip": values}
                arrays["text"] = embedding / np.linalg.norm(embedding)
                label = "" if number == 3 else "left" if embedding[0] < 0 else "right"
                writer.add(split, f"{number:04d}", arrays, f"{split} {number}", label=label)
    save_file({"clip.projection": torch.tensor(projection).float()}, folder / "heads.safetensors")
    return folder


def token_run(folder: Path, mode: str) -> Path:
    store = token_store(folder / "store", splits=("train", "validation"))
    config = replace(small_config(), mode=ModeConfig(mode))
    config = replace(config, data=replace(config.data, name="tokens", tokens=str(store)))
    return make_run(folder / "run", store, config)


def test_a_relative_store_is_found_from_another_working_directory(home, tmp_path, monkeypatch):
    store = token_store(tmp_path / "store", splits=("train", "validation"))
    config = small_config()
    config = replace(config, data=replace(config.data, name="tokens", tokens="store"))
    run = make_run(tmp_path / "run", store, config)
    few = {"baselines": "none", "solvers": [], "curve": [], "images": 4}
    monkeypatch.chdir(tmp_path / "run")
    assert scored(run, home / "fits", **few)[0]["trained_on_these"]
    other = token_store(tmp_path / "other", splits=("train", "validation"), seed=1)
    loaded, config = load(run), EvaluateConfig(ckpt=str(run), device="cpu", **few)
    config.data.tokens = str(other)
    readers = open_readers(loaded, config)
    report = Scorer(loaded, *readers, config, home / "fits", lambda *_: None).run()
    assert not report["trained_on_these"]


def test_recall_and_labels_of_true_tokens_and_of_constants(home, tmp_path):
    run = token_run(tmp_path, "cls_patch")
    report = scored(run, home / "fits", solvers=[], curve=[])[0]
    recalls = report["retrieval"]
    assert recalls["read_out"] == "cls"
    assert recalls["images"] == 16
    assert recalls["true"]["image_to_text"]["R@1"] == 1
    assert recalls["true"]["text_to_image"]["R@1"] == 1
    assert recalls["chance"]["image_to_text"]["R@5"] == pytest.approx(5 / 16)
    assert recalls["mean_token"]["text_to_image"]["R@5"] == pytest.approx(5 / 16)
    assert recalls["generated"]["image_to_text"]["R@1"] < 0.5
    assert report["estimators"]["mean"]["cosine_cls"] is not None
    labels = report["zero_shot"]
    assert (labels["classes"], labels["images"], labels["chance"]) == (2, 15, 0.5)
    assert labels["tower"]["true"]["top1"] > 0.85
    assert labels["tower"]["true"]["agreement"] == 1
    assert labels["tower"]["generated"]["agreement"] < 0.95


def test_class_prompts_of_the_store_win_over_captions(home, tmp_path):
    run = token_run(tmp_path, "cls_patch")
    shown = {}
    for names in (["left", "right"], ["right", "left"]):
        prompts = torch.zeros(2, 4)
        prompts[0, 0], prompts[1, 0] = -1, 1
        tensors, facts = Classes(names, prompts, "tower").content()
        save_file(tensors, tmp_path / "store" / "classes.safetensors", facts)
        zero_shot = scored(run, home / "fits", solvers=[], curve=[], baselines="none")[0]
        shown[names[0]] = zero_shot["zero_shot"]
    assert shown["left"]["classes_from"] == "class prompts"
    assert shown["left"]["tower"]["true"]["top1"] == 1
    assert shown["right"]["tower"]["true"]["top1"] == 0
    assert shown["right"]["tower"]["true"]["agreement"] == 1


def test_a_remote_store_is_scored_as_a_local_one(home, tmp_path):
    run = token_run(tmp_path, "cls_patch")
    few = {"solvers": [], "curve": []}
    local = scored(run, home / "fits", **few)[0]
    config = EvaluateConfig(ckpt=str(run), device="cpu", **few)
    config.data.tokens = f"file://{tmp_path / 'store'}"
    loaded = load(run)
    readers = open_readers(loaded, config)
    remote = Scorer(loaded, *readers, config, home / "fits", lambda *_: None).run()
    for part in ("estimators", "baselines"):
        assert remote[part].keys() == local[part].keys()
        for name, scores in local[part].items():
            assert remote[part][name]["cosine"] == scores["cosine"]
    assert remote["retrieval"]["true"] == local["retrieval"]["true"]


def test_read_out_fitted_on_true_patches_finds_captions_where_the_tower_cannot(home, tmp_path):
    run = token_run(tmp_path, "patch_only")
    recalls = scored(run, home / "fits", solvers=[], curve=[])[0]["retrieval"]
    assert recalls["read_out"] == "patch_mean"
    assert recalls["true"]["image_to_text"]["R@1"] < 0.6
    assert recalls["fitted"]["true"]["image_to_text"]["R@1"] > 0.9
    assert recalls["fitted"]["mean_token"]["text_to_image"]["R@1"] == pytest.approx(1 / 16)


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


@pytest.mark.parametrize(
    ("mean", "ridge", "place"),
    [
        ([0.1, 0.2], [0.01, 0.02], "above every baseline"),
        ([0.1, 0.2], [-0.02, -0.01], "below ridge"),
        ([0.1, 0.2], [-0.01, 0.02], "level with ridge"),
        ([-0.2, -0.1], [-0.01, 0.0], "below mean token, level with ridge"),
        ([-0.2, -0.1], [-0.02, -0.01], "below mean token and ridge"),
    ],
)
def test_verdicts_stand_beside_the_baselines(mean, ridge, place):
    words = [verdict(cosine) for cosine in (0.29, 0.3, 0.6, 0.8)]
    assert words == ["failing", "works", "good", "excellent"]
    report = {
        "headline": "mean",
        "images": 3,
        "split": "validation",
        "estimators": {"mean": {"cosine": 0.85}},
        "baselines": {"mean_token": {"cosine": 0.9}, "ridge": {"cosine": 0.8}},
        "against": {"mean": {"mean_token": {"ci95": mean}, "ridge": {"ci95": ridge}}},
    }
    assert standing(report) == f"excellent by the seeds' thresholds, {place}"
    assert verdict_note(report).endswith("against mean token 0.9000, ridge 0.8000")
    report |= {"baselines": {}, "against": {"mean": {}}}
    assert standing(report).endswith("compared with no baseline")


def test_numbers_that_are_not_finite_name_their_place():
    with pytest.raises(UserError, match=r"estimators\.heun-10\.mse is nan"):
        check_finite({"estimators": {"heun-10": {"mse": float("nan")}}})


def test_guided_estimators_are_scored_and_need_dropout(home, run, tmp_path):
    config = replace(small_config(), flow=FlowConfig(condition_dropout=0.1))
    guided = make_run(tmp_path / "guided", config=config)
    names = ["euler-2", "euler-2@1.5", "mean@1.5"]
    settings = {"baselines": "none", "curve": [], "samples": 0, "images": 16}
    found, _ = scored(guided, home / "fits", solvers=names, **settings)
    blocks = found["estimators"]
    assert list(blocks) == ["mean", *names]
    assert [blocks[name]["nfe"] for name in blocks] == [1, 2, 4, 2]
    loaded, (held, _) = load(guided), open_readers(load(guided), EvaluateConfig(str(guided)))
    batch = held.read(np.arange(16))
    solver = solver_from_label("mean@1.5")
    made = loaded.translator.generate(batch["condition"], torch.arange(16), 0, solver).x1_BND
    wanted = torch.cosine_similarity(made, batch["target"].float(), dim=-1).mean()
    assert blocks["mean@1.5"]["cosine"] == pytest.approx(float(wanted), abs=1e-6)
    assert blocks["mean@1.5"]["cosine"] != blocks["mean"]["cosine"]
    with pytest.raises(UserError, match="condition_dropout above 0"):
        scored(run, home / "fits", solvers=["mean@1.5"], **settings)


@pytest.mark.parametrize("label", ["heun-10@", "heun-10@x"])
def test_a_guidance_that_is_no_number_is_refused(label):
    with pytest.raises(UserError, match=r"as in heun-10@1\.5"):
        solver_from_label(label)


def test_phases_are_forecast_from_what_they_evaluate(run, home):
    settings = {"solvers": ["heun-3"], "curve": ["euler-1", "euler-2"], "curve_images": 20}
    config = EvaluateConfig(ckpt=str(run), device="cpu", solver_images=10, **settings)
    loaded = load(run)
    readers = open_readers(loaded, config)
    scorer = Scorer(loaded, *readers, config, home / "fits", lambda what, done, total: None)
    seconds = phase_seconds(scorer)
    image = seconds["loss by time"] / (20 * 8)
    assert image > 0
    # Of heun's five evaluations (the last of three steps is one) and of euler's, the first is the
    # mean's; the first of four draws is the solver's own.
    assert seconds["scoring"] == pytest.approx((48 + 10 * 4 + 20 * 1 + 16 * 3 * 4) * image)
    assert seconds["swapped conditions"] == pytest.approx(20 * (1 + 4) * image)
    assert "noise-free transformer" not in seconds
