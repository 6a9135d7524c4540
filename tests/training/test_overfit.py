"""Overfitting as a test that can fail: images learnt by heart are generated, not merely denoised.

Noise and times are drawn afresh at each step, and the score is the cosine of tokens that an ODE
solver generates for the training images. The seeds froze noise and times and scored the velocity.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from blip3o_lit import BLIP3oInference
from blip3o_lit.config.data import DataConfig, LinearGaussianConfig
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import EvaluationConfig, PrecisionConfig, TrainerConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.path import Path as FlowPath
from blip3o_lit.training.overfit import FAILED_CODE, check_overfit
from blip3o_lit.training.run import open_data, run_training

BAR = 0.95
SOLVER = "heun-10"
# The condition explains so little that the best translator of unseen images stays far below BAR.
PROBLEM = LinearGaussianConfig(
    images=8, validation_images=64, grid=2, condition_width=16, target_width=8, explained=0.3
)


def train(folder: Path) -> Path:
    config = TrainConfig(
        model=ModelConfig(width=64, depth=2, heads=2, kv_heads=2, mlp_width=128),
        data=DataConfig(name="linear_gaussian", linear_gaussian=PROBLEM),
        flow=FlowConfig(prediction="velocity"),
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.0, ema_decay=0.98),
        precision=PrecisionConfig("fp32"),
        trainer=TrainerConfig(max_steps=300, log_every=100, accelerator="cpu"),
        evaluation=EvaluationConfig(every=300, images=8, overfit_at_least=BAR),
        solver=SolverConfig("heun", 10),
        batch_size=32,
    )
    run_training(config, folder, [])
    return folder / "checkpoints" / "last.ckpt"


def check(folder: Path) -> dict[str, Any]:
    """Return what the run itself says of its overfit check."""
    return json.loads((folder / "result.json").read_text("utf-8"))["overfit"]


def scored(file: Path, same_data: bool = True) -> dict[str, Any]:
    settings: dict[str, Any] = {"baselines": "none", "solvers": [SOLVER], "curve": [], "samples": 1}
    return BLIP3oInference(file, "cpu").evaluate_model(same_data=same_data, **settings)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    os.environ["BLIP3O_HOME"] = str(shared_home)
    return train(tmp_path_factory.mktemp("learnt"))


def test_the_run_itself_passes(learnt: Path) -> None:
    found = check(learnt.parent.parent)
    assert found["passed"]
    assert (found["images"], found["split"], found["estimator"]) == (8, "train", SOLVER)
    same = scored(learnt)["estimators"][SOLVER]["cosine"]
    assert found["cosine"] == pytest.approx(same, abs=1e-5)


def test_training_images_are_generated_and_every_number_says_train(learnt: Path) -> None:
    result = scored(learnt)
    assert result["split"] == "train"
    blocks = [*result["estimators"].values(), *result["optimum"].values()]
    assert {block["split"] for block in blocks} == {"train"}
    assert result["images"] == PROBLEM.images
    assert result["estimators"][SOLVER]["cosine"] > BAR
    # By heart: better than the exact law of unseen images allows.
    assert result["estimators"][SOLVER]["cosine"] > result["optimum"]["mean"]["cosine"] + 0.1


def test_images_that_were_not_seen_stay_below_the_bar(learnt: Path) -> None:
    result = scored(learnt, same_data=False)
    assert result["split"] == "validation"
    assert result["estimators"][SOLVER]["cosine"] < BAR - 0.1


def test_redrawn_target_noise_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seeds' bug: the target's noise was not the input's, so samples keep their noise."""
    right, draw = FlowPath.output, torch.Generator().manual_seed(0)

    def redrawn(self: FlowPath, name: str, x1: Any, z: Any, t: Any) -> Any:
        return right(self, name, x1, torch.randn(z.shape, generator=draw), t)

    with monkeypatch.context() as patch:
        patch.setattr(FlowPath, "output", redrawn)
        with pytest.raises(SystemExit) as stopped:
            train(tmp_path)
    assert stopped.value.code == FAILED_CODE
    assert not check(tmp_path)["passed"]
    assert check(tmp_path)["cosine"] < BAR - 0.1


def test_a_flipped_ode_direction_fails(learnt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another of the seeds' bugs: the solver steps against the velocity."""
    right = FlowObjective.velocity
    with monkeypatch.context() as patch:
        patch.setattr(FlowObjective, "velocity", lambda *a, **k: -right(*a, **k))
        assert scored(learnt)["estimators"][SOLVER]["cosine"] < 0
        model = BLIP3oInference(learnt, "cpu")
        config, data = model.config, open_data(model.config)[0]
        assert not check_overfit(config, model.translator, data, BAR).passed
