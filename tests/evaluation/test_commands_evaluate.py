"""evaluate, generate and export as commands: files, resumption, refusals with exit code 2."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from made_run import make_run

from blip3o_lit import evaluate as evaluating
from blip3o_lit.config.commands import ExportConfig, GenerateConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.export import export
from blip3o_lit.generate import generate
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(tmp_path_factory.mktemp("home")))
        yield make_run(tmp_path_factory.mktemp("made") / "run")


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", ["evaluate", *words])
    evaluating.main()


def test_evaluate_writes_json_and_report(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, f"ckpt={run}", "solvers=[euler-2]", "curve=[euler-1]", "images=16")
    content = json.loads((run / "evaluation.json").read_text())
    assert list(content) == sorted(content)
    assert set(content["estimators"]) == {"mean", "euler-2"}
    assert (run / "report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "next: python -m blip3o_lit.export" in printed
    assert "mean_token" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["baselines=cheap"], "ckpt=PATH is missing"),
        (["ckpt=x", "vs=y", "same_date=true"], "did you mean same_data"),
        (["ckpt=x", "baseline=all"], "did you mean baselines"),
        (["ckpt=x", "baselines=chaep"], "did you mean baselines=cheap"),
        (["ckpt=no/where/at-all"], "no checkpoint at no/where/at-all"),
    ],
)
def test_mistakes_exit_with_2_and_one_line(words, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, *words)
    assert stopped.value.code == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said


@pytest.fixture
def store(run) -> Path:
    return Path(
        torch.load(run / "checkpoints/last.ckpt", weights_only=True)["blip3o"]["tokens"]["path"]
    )


def test_generated_store_has_the_keys_and_the_tokens(run, store, tmp_path):
    solver = SolverConfig(name="euler", steps=3)
    config = GenerateConfig(str(run), str(store), str(tmp_path / "out"), solver=solver)
    config.device = "cpu"
    made = TokenStore.open(generate(config), verify="full")
    assert made.index.splits == TokenStore.open(store).index.splits
    spec = made.index.arrays["clip"]
    assert spec.preprocessing["generated"]["solver"]["name"] == "euler"
    ids = np.arange(48)
    source = TokenReader(TokenStore.open(store), "validation")
    result = TokenReader(made, "validation", "clip", "clip")
    assert result.keys(ids) == source.keys(ids)
    model = BLIP3oInference(run, "cpu")
    expected = model.generate(source.read(ids)["condition"], solver=solver)
    torch.testing.assert_close(result.read(ids)["target"].float(), expected, rtol=2e-3, atol=2e-3)


def test_a_stopped_generation_goes_on_and_another_is_refused(run, store, tmp_path):
    out = tmp_path / "out"
    config = GenerateConfig(str(run), str(store), str(out), device="cpu")
    generate(config)
    whole = {file.name: file.read_bytes() for file in out.iterdir()}
    kept = (out / "train-000000.tar").stat().st_mtime_ns
    (out / "index.json").unlink()
    (out / "validation-000000.tar").unlink()
    generate(config)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == whole
    assert (out / "train-000000.tar").stat().st_mtime_ns == kept
    with pytest.raises(UserError, match="begun with another seed: choose another out="):
        generate(GenerateConfig(str(run), str(store), str(out), seed=1, device="cpu"))
    with pytest.raises(UserError, match=r"holds index\.json of another command"):
        generate(GenerateConfig(str(run), str(store), str(store), device="cpu"))


def test_model_card_holds_the_evaluation(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    call(monkeypatch, f"ckpt={run}", "solvers=[]", "curve=[]", "images=16")
    out = export(ExportConfig(str(run), str(tmp_path / "out")))
    content = json.loads((run / "evaluation.json").read_text())
    card = (out / "README.md").read_text()
    assert f"{content['baselines']['ridge']['cosine']:.4f}" in card
    assert "16 images of the validation split" in card
    with pytest.raises(UserError, match="choose another one"):
        export(ExportConfig(str(out), str(out)))


def test_two_checkpoints_are_compared_image_by_image(run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["solvers=[]", "curve=[]", "baselines=none", "images=16", f"out={tmp_path / 'to'}"]
    call(monkeypatch, f"ckpt={run}", f"vs={run}", *words)
    content = json.loads((tmp_path / "to" / "evaluation.json").read_text())
    assert content["paired"]["cosine"]["mean"]["p_value"] == 1
    assert "mean against run: +0.00000" in capsys.readouterr().out
