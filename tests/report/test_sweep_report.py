import csv
import json
from pathlib import Path
from typing import Any

import pytest
from made_report import HOSTILE, Page

from blip3o_lit.config.errors import UserError
from blip3o_lit.report import charts
from blip3o_lit.report.__main__ import main
from blip3o_lit.report.sweep import write_sweep

SCORES = {"0": 0.91, "1": 0.97, "2": None, "10": 0.95}


def make_sweep(folder: Path) -> Path:
    """Four runs over two keys; run 2 never ended."""
    for number, (name, score) in enumerate(SCORES.items()):
        run = folder / name
        run.mkdir(parents=True)
        path = ("linear", "trigonometric")[number % 2]
        config = f"optimizer:\n  lr: {10.0**-number}\nflow:\n  path: {path}\nseed: 0\n"
        (run / "config.yaml").write_text(config)
        (run / "overrides.txt").write_text(f"optimizer.lr=1e-{number}\nflow.path={path}\n")
        (run / "metrics.csv").write_text("step,train/loss,val/cosine\n1,1.5,0.5\n2,0.5,0.9\n")
        if score is not None:
            result = {"finished": True, "estimator": "mean", "best": {"cosine": score, "step": 2}}
            (run / "result.json").write_text(json.dumps({**result, "seconds": 12.5, "step": 2}))
    (folder / "multirun.yaml").write_text("hydra: {}\n")
    return folder


def test_sweep_page_ranks_runs_and_repeats_the_best(tmp_path: Path, capsys) -> None:
    folder = make_sweep(tmp_path / "sweep")
    assert main([str(folder)]) == 0
    target = folder / "sweep.html"
    assert capsys.readouterr().out.strip() == str(target)
    found = Page(target.read_text("utf-8"))
    assert found.open == []
    assert "python -m blip3o_lit.train optimizer.lr=1e-1 flow.path=trigonometric" in found.text
    assert "4 runs over optimizer.lr, flow.path. Best: 0.9700 by run 1" in found.text
    specs = json.loads(found.data["charts"])["specs"]
    assert set(specs) == {"setting-0", "setting-1", "learning-loss", "learning-cosine"}
    assert len([b for b in found.all("button") if "data-column" in b]) == 9
    rows = list(csv.DictReader((folder / "sweep.csv").open()))
    assert [row["run"] for row in rows] == ["1", "10", "0", "2"]
    assert [row["cosine"] for row in rows] == ["0.97", "0.95", "0.91", ""]
    assert rows[-1]["ended"] == "no result"
    assert "seed" not in rows[0]


def test_evaluated_sweeps_are_ranked_by_their_evaluations(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "sweep")
    for name in SCORES:
        scores = {"mean": {"cosine": 0.5 + int(name) / 100, "nfe": 1}}
        report = {"estimators": scores, "images": 8, "split": "validation"}
        (folder / name / "evaluation.json").write_text(json.dumps(report))
    found = Page(write_sweep(folder).read_text("utf-8"))
    assert "Best: 0.6000 by run 10" in found.text
    assert "Posterior mean, 1 NFE, 8 images of validation" in found.text


def test_numbers_have_an_axis_of_their_size_and_words_stand_evenly() -> None:
    def channel(*values: object) -> dict[str, Any]:
        points = [(str(run), value, 0.5 + run / 10) for run, value in enumerate(values)]
        return charts.effect("key", points)["encoding"]["x"]

    rate = channel(1e-4, 1e-2, 1e-3)
    assert (rate["type"], rate["scale"]["type"]) == ("quantitative", "log")
    depth = channel(4, 8, 12)
    assert depth["type"] == "quantitative"
    assert "type" not in depth["scale"]
    assert channel("b", "a", 3)["type"] == "nominal"
    assert channel(float("nan"), 1.0)["type"] == "nominal"


def test_sweep_of_one_run_without_result_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "config.yaml").write_text(f"name: {json.dumps(HOSTILE)}\n")
    found = Page(write_sweep(tmp_path).read_text("utf-8"))
    assert "None has a score yet" in found.text
    assert len(found.all("script")) == 3


def test_a_directory_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no runs"):
        write_sweep(tmp_path)
