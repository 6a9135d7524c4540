"""docs/results.md: every run is a valid command line, and the page says what its runs say."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from conftest import ROOT

from blip3o_lit.cli.command import composed
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.train import TrainConfig

sys.path.insert(0, str(ROOT / "scripts"))
from recipes import BASE, DEFAULT, PARTS, RECIPES, RUNS, SEED_RECIPES, Recipe, Run
from results_claims import REASONS, claims
from results_found import Found, interval
from results_page import verdict, write_page
from results_records import RECORDS, read_record, rounded, with_defaults


def scores(cosine: float, sample: float = 0.9) -> dict[str, Any]:
    return {
        "estimators": {
            "mean": {"cosine": cosine, "frechet_token": 3.0, "variance_ratio": 0.7},
            "ab2-8": {"cosine": sample, "frechet_token": 0.9, "variance_ratio": 1.0},
            "heun-10": {"cosine": sample, "frechet_token": 0.9, "variance_ratio": 1.0},
        },
        "training_seconds": 60.0,
    }


def found(recipe: Recipe, testbed: str, cosines: list[float]) -> Found:
    runs = [Run(recipe, testbed, seed) for seed in range(len(cosines))]
    return {run: scores(cosine, min(cosine, 0.9)) for run, cosine in zip(runs, cosines)}


def test_recipes_have_names_of_their_own() -> None:
    places = [(recipe.key, testbed) for recipe in RECIPES for testbed in recipe.testbeds]
    assert len(set(places)) == len(places)
    assert len({run.name for run in RUNS}) == len(RUNS)


@pytest.mark.parametrize("run", [run for run in RUNS if run.seed == 0], ids=lambda run: run.name)
def test_every_run_is_a_valid_command_line(run: Run) -> None:
    config = composed("train", TrainConfig, run.overrides)
    scored = composed("evaluate", EvaluateConfig, ["ckpt=run", *run.evaluation])
    assert config.seed == 0
    assert scored.images


def test_a_key_that_a_record_is_older_than_stood_at_its_default() -> None:
    defaults = {"lr": 1.0, "model": {"width": 8, "new": 0}, "other": 1}
    then = {"lr": 0.1, "model": {"width": 64, "gone": 2}}
    assert with_defaults(then, defaults) == {
        "lr": 0.1,
        "model": {"width": 64, "new": 0, "gone": 2},
        "other": 1,
    }


def test_every_record_is_a_run_of_today_s_and_is_on_the_page() -> None:
    """One that was made with other settings, or of a recipe that is gone, is taken out."""
    names = {run.name: run for run in RUNS}
    files = sorted(RECORDS.rglob("*.json"))
    for file in files:
        name = str(file.relative_to(RECORDS).with_suffix(""))
        assert name in names, name
        assert read_record(names[name]) is not None, name
    page = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert not files or f"{len(files)} of {len(RUNS)} runs" in " ".join(page.split())


def test_figures_are_rounded_wherever_they_stand() -> None:
    assert rounded({"a": [1 / 3, {"b": 2 / 3}], "c": "x", "d": 7}) == {
        "a": [0.333333, {"b": 0.666667}],
        "c": "x",
        "d": 7,
    }


def test_an_interval_is_student_s() -> None:
    # Mean 2, standard deviation 1, three values: 2 -+ 4.303 / sqrt(3).
    low, high = interval([1.0, 2.0, 3.0]) or (0, 0)
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert interval([1.0]) is None


@pytest.mark.parametrize(
    ("cosines", "said"),
    [
        ([0.92, 0.93, 0.925], "better"),
        ([0.88, 0.885, 0.87], "worse"),
        ([0.96, 0.88, 0.90], "better?"),  # the interval holds 0
        ([0.9003, 0.9103, 0.8903], "same"),  # below the smallest difference, on each seed
        ([0.93], "better?"),
    ],
)
def test_a_part_is_better_only_when_its_seeds_say_so(cosines: list[float], said: str) -> None:
    base = found(BASE, "demo", [0.90, 0.91, 0.89])
    part = PARTS[0]
    assert verdict(base | found(part, "demo", cosines), part, "demo", "mean") == said


def test_samples_are_compared_by_their_distance_not_their_cosine() -> None:
    runs = found(BASE, "demo", [0.9, 0.9]) | found(PARTS[0], "demo", [0.9, 0.9])
    for run, block in runs.items():
        if run.recipe is PARTS[0]:
            block["estimators"]["ab2-8"] |= {"cosine": 0.99, "frechet_token": 1.8}
    assert verdict(runs, PARTS[0], "demo", "ab2-8") == "worse"


def test_a_claim_is_missed_when_the_figure_misses_the_target() -> None:
    theirs = found(SEED_RECIPES[0], "demo", [0.5, 0.5])
    line = next(x for x in claims(seen(0.9) | theirs) if SEED_RECIPES[0].key in x)
    assert "| 0.2000 (0.0000) | met | 2 |" in line
    line = next(x for x in claims(seen(0.8) | theirs) if SEED_RECIPES[0].key in x)
    assert "| 0.4000 (0.0000) | MISSED | 2 |" in line


def seen(cosine: float) -> Found:
    """The default on the demo with two seeds, as far as the claims about the seeds read it."""
    runs = found(DEFAULT, "demo", [cosine, cosine])
    points = [{"solver": s, "nfe": n, "cosine": 0.9, "frechet": 1.0} for s, n in CURVE]
    for block in runs.values():
        against = {name: {"regression": {"difference": 0.001}} for name in ("mean", "ab2-4")}
        block |= {"nfe_curve": points, "against": against}
    return runs


CURVE = (("ab2", 4), ("euler", 50))


def test_the_optimum_is_compared_estimator_by_estimator() -> None:
    runs = found(BASE, "linear_gaussian", [0.9])
    block = next(iter(runs.values()))
    exact = {"cosine": 0.9, "variance_ratio": 1.0}
    points = [{"solver": s, "nfe": n, "cosine": 0.9, "frechet": 1.0} for s, n in CURVE]
    block |= {
        "nfe_curve": points,
        "optimum": {"mean": exact, "sample": {"cosine": 0.9, "variance_ratio": 1.03}},
        "frechet_floor": {"frechet_token": 1.0},
        "against": {n: {"regression": {"difference": 0.0}} for n in ("mean", "ab2-4")},
    }
    lines = claims(runs)
    assert any("exact mean's" in line and "met" in line for line in lines)
    assert any("variance" in line and "MISSED" in line for line in lines)
    reasons = lines[lines.index("Missed:") :]
    assert [line for line in reasons if line.startswith("- ")] == [
        f"- {REASONS['linear_gaussian: variance of heun']}"
    ]


def test_only_what_is_missed_has_a_reason() -> None:
    assert "Missed:" not in claims(seen(0.9))


def test_a_page_of_no_runs_is_written(tmp_path) -> None:
    write_page(tmp_path / "page.md", {})
    assert "0 of" in (tmp_path / "page.md").read_text("utf-8")
