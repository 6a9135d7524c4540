"""Fitted solvers of a run: fitted by evaluate, kept beside the weights, refused for other ones."""

import json
import shutil

import pytest
import torch
from made_run import make_run

from blip3o_lit import BLIP3oInference
from blip3o_lit.checkpoints.load import load
from blip3o_lit.checkpoints.solvers import SOLVERS_FILE, kept_solvers, save_solvers
from blip3o_lit.config.commands import ExportConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.evaluation.solver_fits import fit_solvers
from blip3o_lit.export import export
from blip3o_lit.flow.fitted import scheme_of
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.scheme import FittedSolvers

SETTINGS = {"baselines": "none", "curve": [], "samples": 0, "images": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(tmp_path_factory.mktemp("home")))
        folder = make_run(tmp_path_factory.mktemp("run"))
        evaluate(EvaluateConfig(str(folder), solvers=["fitted-2"], **SETTINGS))
        yield folder


def conditions():
    return torch.randn(3, 16, 6, generator=torch.Generator().manual_seed(1))


def test_an_evaluation_fits_what_is_missing_and_says_what_it_chose(run):
    result = json.loads((run / "evaluation.json").read_text())
    assert result["estimators"]["fitted-2"]["nfe"] == 2
    record = result["fitted_solvers"]["2"]
    assert record["distance"] <= min(record["fixed"].values())
    assert record["seconds"] > 0
    page = (run / "report.html").read_text()
    assert "Fitted solvers" in page
    assert "Fitted solver, 2 evaluations" in page


def test_a_second_evaluation_adds_budgets_and_keeps_the_first(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    before = load(folder).translator.fitted.schemes[2]
    evaluate(EvaluateConfig(str(folder), solvers=["fitted-3", "fitted-2"], **SETTINGS))
    after = load(folder).translator.fitted
    assert set(after.schemes) == set(after.records) == {2, 3}
    assert torch.equal(after.schemes[2].weights_KS, before.weights_KS)


def test_run_and_export_generate_the_same(run, tmp_path):
    model = BLIP3oInference(run, "cpu")
    export(ExportConfig(str(run), str(tmp_path / "export")))
    shared = BLIP3oInference(tmp_path / "export", "cpu")
    own = model.generate(conditions(), solver="fitted-2")
    assert torch.equal(own, shared.generate(conditions(), solver="fitted-2"))
    # Where one is stored, so many evaluations mean it.
    assert torch.equal(own, model.generate(conditions(), num_inference_steps=2))
    other = model.generate(conditions(), num_inference_steps=4)
    assert torch.equal(other, model.generate(conditions(), solver="heun-4"))
    tokens, states = model.generate(conditions(), solver="fitted-2", return_intermediate=True)
    assert len(states) == 2
    assert torch.equal(states[-1], tokens)


def test_other_weights_and_missing_budgets_are_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"solver.nfe=8.*evaluate ckpt=RUN solvers=\[fitted-8\]"):
        BLIP3oInference(run, "cpu").generate(conditions(), solver="fitted-8")
    folder = shutil.copytree(run, tmp_path / "copy")
    file = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["state_dict"]["ema.output.weight"][0, 0] += 1
    torch.save(checkpoint, file)
    model = BLIP3oInference(folder, "cpu")
    assert torch.isfinite(model.generate(conditions())).all()
    with pytest.raises(UserError, match="solvers.safetensors was fitted to other weights"):
        model.generate(conditions(), solver="fitted-2")
    evaluate(EvaluateConfig(str(folder), solvers=["fitted-2"], **SETTINGS))
    BLIP3oInference(folder, "cpu").generate(conditions(), solver="fitted-2")


def test_another_flow_is_refused(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    file = folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(file, weights_only=True)
    checkpoint["blip3o"]["config"]["flow"]["path"] = "trigonometric"
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match="or another flow"):
        BLIP3oInference(folder, "cpu").generate(conditions(), solver="fitted-2")


def test_a_damaged_file_is_named(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / SOLVERS_FILE).write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"solvers.safetensors is damaged: delete it"):
        load(folder)


def test_training_does_not_take_what_is_fitted_after_it():
    with pytest.raises(UserError, match="solver=fitted is fitted after training"):
        TrainConfig(solver=SolverConfig(name="fitted"))


def test_without_training_images_nothing_is_fitted(run):
    with pytest.raises(UserError, match=r"fitted-5.*no training split"):
        fit_solvers(load(run), None, [5], 0, lambda *_: None)


@pytest.mark.parametrize("name", ["euler", "midpoint", "heun", "ab2"])
def test_a_usual_solver_that_was_chosen_is_kept_as_it_is(tmp_path, name):
    scheme = scheme_of(FlowObjective(FlowConfig()), SolverConfig.named(name, steps=4))
    nfe = len(scheme.times_K)
    save_solvers(FittedSolvers({nfe: scheme}, {nfe: {"chosen": name}}), "weights", tmp_path)
    kept = kept_solvers(tmp_path / SOLVERS_FILE, "weights").schemes[nfe]
    assert torch.equal(kept.times_K, scheme.times_K)
    assert torch.equal(kept.weights_KS, scheme.weights_KS)
