"""A run on several stores: resumed bit-equal in mid-epoch, scores by store, a change refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from quick_run import PROBLEM, config, differences, state

from blip3o_lit.base.files import write_json
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.load import load
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.trainer import TrainerConfig
from blip3o_lit.evaluation.readers import open_readers, trained_images
from blip3o_lit.evaluation.score import Scorer
from blip3o_lit.report.page import write_report
from blip3o_lit.testbeds.linear_gaussian import linear_gaussian_store
from blip3o_lit.training.run import run_training


@pytest.fixture(scope="module")
def stores(tmp_path_factory, shared_home: Path) -> dict[str, float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(shared_home))
        problems = [replace(PROBLEM, images=images, seed=3) for images in (40, 24)]
        return dict(zip((str(linear_gaussian_store(problem)) for problem in problems), (1.0, 2.0)))


def mixed(stores, steps: int = 6, **changes):
    data = DataConfig(name="tokens", tokens=stores)
    trainer = TrainerConfig(max_steps=steps, log_every=1, accelerator="cpu")
    return config(data=data, trainer=trainer, **changes)


def test_a_run_on_two_stores(stores, tmp_path, monkeypatch, shared_home):
    monkeypatch.setenv("BLIP3O_HOME", str(shared_home))
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    run_training(mixed(stores), straight, [])
    resume = str(
        straight / "checkpoints" / "step-00000002.ckpt"
    )  # in the first epoch of four steps
    run_training(mixed(stores, resume=resume), parts, [])
    ends = [state(run / "checkpoints" / "step-00000006.ckpt") for run in (straight, parts)]
    for end in ends:
        end.pop("callbacks")
    assert differences(*ends) == []

    rows = [row for row in read_rows(straight / "metrics.csv") if row["val/cosine"]]
    names = sorted(Path(store).name for store in stores)
    by_store = [float(rows[-1][f"val/{name}/cosine"]) for name in names]
    assert float(rows[-1]["val/cosine"]) == pytest.approx(sum(by_store) / 2, abs=1e-6)

    facts = checkpointing.about(straight / "checkpoints" / "last.ckpt")["tokens"]
    assert {store["path"]: store["weight"] for store in facts["stores"]} == stores
    written = json.loads((straight / "environment.json").read_text())
    assert written["stores"] == facts["stores"]
    weights = dict(zip(stores, (1.0, 3.0)))
    with pytest.raises(UserError, match="of the stores that it was trained on, .* its weight"):
        run_training(mixed(weights, resume=resume), tmp_path / "other", [])

    loaded = load(straight)
    settings = EvaluateConfig(ckpt=str(straight), solvers=[], curve=[], samples=0, drawn_images=0)
    held, train = open_readers(loaded, settings)
    assert trained_images(loaded, held) == 0
    report = Scorer(loaded, held, train, settings, tmp_path / "fits", lambda *_: None).run()
    assert report["trained_on_these"]
    assert sorted(report["stores"]) == names
    cosines = [report["stores"][name]["cosine"] for name in names]
    assert cosines[0].keys() == {"mean", "mean_token", "ridge"}
    write_json(straight / "evaluation.json", report)
    page = write_report(straight).read_text("utf-8")
    assert all(name in page for name in ("By store", *names))
    both = sum(cosine["mean"] for cosine in cosines) / 2
    assert report["estimators"]["mean"]["cosine"] == pytest.approx(both, abs=1e-6)
