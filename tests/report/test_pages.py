"""Pages of large runs stay small and open quickly: 10,000 images, 500 trials.

How quickly is said against the page of a small run, opened in turn with it: seconds depend on what
else a machine does. `make soak` asks for seconds.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import CHROMIUM, opened
from made_report import evaluation
from made_run import PROBLEM, make_run, small_config

from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.report.page import write_report
from blip3o_lit.report.sweep import write_sweep
from blip3o_lit.testbeds.linear_gaussian import linear_gaussian_store

BYTES = 5_000_000
SECONDS = 2.0
FEW, MANY = 5, 500
"""Trials of a small and of a large sweep."""
SETTINGS = ("optimizer.lr", "optimizer.weight_decay", "model.width", "flow.path", "seed")


def write_metrics(run: Path, steps: int) -> None:
    """Write the metrics of a run that logged every step."""
    draw = random.Random(steps)
    lines = ["step,train/loss,train/cosine,val/cosine,train/lr,train/grad_norm,train/data_wait"]
    for step in range(1, steps + 1):
        cosine = 1 - 1 / math.sqrt(step) + 0.01 * draw.random()
        checked = f"{cosine:.5f}" if step % 50 == 0 else ""
        lines.append(f"{step},{1 / step + draw.random():.6f},{cosine:.6f},{checked},3e-4,0.5,0.01")
    (run / "metrics.csv").write_text("\n".join(lines) + "\n")


def scored_run(folder: Path, images: int) -> Path:
    """Return a run of 50,000 steps, scored on so many images by the command itself."""
    problem = replace(PROBLEM, grid=2, validation_images=images)
    config = small_config()
    config.data = replace(config.data, linear_gaussian=problem)
    run = make_run(folder, linear_gaussian_store(problem), config)
    write_metrics(run, 50_000)
    (run / "config.yaml").write_text("seed: 0\n")
    evaluate(EvaluateConfig(str(run), batch_size=500, solvers=[]))
    return run


def with_pictures(run: Path) -> Path:
    """Return the run's page with the maps of a 16x16 grid and the pictures of a demo added."""
    scored = json.loads((run / "evaluation.json").read_text("utf-8"))
    more = {name: evaluation()[name] for name in ("position_cosine", "position_std", "examples")}
    (run / "evaluation.json").write_text(json.dumps({**scored, **more}))
    return write_report(run)


def search(folder: Path, trials: int) -> Path:
    """Return the page of so many trials over five keys, as a search leaves them."""
    draw = random.Random(0)
    for number in range(trials):
        run = folder / str(number)
        run.mkdir(parents=True)
        values = (
            10 ** draw.uniform(-5, -2),
            draw.choice([0.0, 0.01, 0.1]),
            draw.choice([256, 384, 512]),
            draw.choice(["linear", "trigonometric", "seed_cosine"]),
            number,
        )
        config: dict[str, object] = {"batch_size": 64}
        for key, value in zip(SETTINGS, values, strict=True):
            group, _, name = key.partition(".")
            config |= {group: {**config.get(group, {}), name: value}} if name else {key: value}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        words = [f"{key}={value}" for key, value in zip(SETTINGS, values, strict=True)]
        (run / "overrides.txt").write_text("\n".join(words) + "\n")
        write_metrics(run, 100)
        best = {"cosine": draw.random(), "step": 100}
        result = {"finished": True, "estimator": "mean", "best": best, "step": 100, "seconds": 60}
        (run / "result.json").write_text(json.dumps(result))
    return write_sweep(folder)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> list[Path]:
    """Runs scored on 100 and on 10,000 images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(shared_home))
        folder = tmp_path_factory.mktemp("runs")
        return [scored_run(folder / str(images), images) for images in (100, 10_000)]


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pages of a small and of a large sweep."""
    folder = tmp_path_factory.mktemp("sweeps")
    return [search(folder / str(trials), trials) for trials in (FEW, MANY)]


@pytest.fixture(scope="module")
def openings(
    reports: list[Path], sweeps: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What a browser saw of the four pages, small before large."""
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    pages = [*map(with_pictures, reports), *sweeps]
    return opened(*pages, profile=tmp_path_factory.mktemp("opened"))


def quickest(seen: dict[str, Any]) -> float:
    """Other processes of a busy machine only add to an opening."""
    return min(seen["seconds"])


def test_the_report_of_ten_thousand_images_is_small(reports: list[Path]) -> None:
    report = reports[1]
    scored = json.loads((report / "evaluation.json").read_text("utf-8"))
    assert scored["images"] == 10_000
    assert (report / "evaluation.json").stat().st_size < 200_000, "grows with the images"
    assert "10,000 images" in (report / "report.html").read_text("utf-8")
    assert (report / "report.html").stat().st_size < BYTES


def test_the_page_of_500_trials_is_small(sweeps: list[Path]) -> None:
    assert sweeps[1].stat().st_size < BYTES


def test_a_report_of_100_times_the_images_opens_as_quickly(openings: list[dict[str, Any]]) -> None:
    few, many, *_ = openings
    assert many["charts"] == few["charts"] >= 8
    assert quickest(many) < 2 * quickest(few), openings


def test_a_page_of_100_times_the_trials_opens_in_a_few_times_the_time(
    openings: list[dict[str, Any]],
) -> None:
    *_, few, many = openings
    assert (few["rows"], many["rows"]) == (FEW, MANY)
    assert quickest(many) < 6 * quickest(few), openings  # 3 times, as measured


@pytest.mark.soak
def test_large_pages_open_in_two_seconds_on_a_quiet_machine(openings: list[dict[str, Any]]) -> None:
    assert max(map(quickest, openings)) < SECONDS, openings
