"""Validation sees the loss at fixed times and samplers, and agrees with the evaluate command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from quick_run import config

from blip3o_lit import BLIP3oInference
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.trainer import EvaluationConfig, TrainerConfig
from blip3o_lit.training.run import run_training


def test_losses_at_fixed_times_and_samplers_are_those_of_evaluate(tmp_path: Path) -> None:
    checks = EvaluationConfig(
        every=2, images=20, loss_times=8, estimators=["heun-3"], estimator_images=7
    )
    trainer = TrainerConfig(max_steps=4, log_every=2, accelerator="cpu")
    # Micro-batches of 4: the seven images of the sampler end inside one.
    run_training(config(evaluation=checks, trainer=trainer, micro_batch_size=4), tmp_path, [])
    row = read_rows(tmp_path / "metrics.csv")[-1]
    last = tmp_path / "checkpoints" / "last.ckpt"
    settings: dict[str, Any] = {"baselines": "none", "curve": [], "samples": 0}
    result = BLIP3oInference(last, "cpu").evaluate_model(
        tokens=str(checkpointing.about(last)["tokens"]["path"]),
        **settings,
        solvers=["heun-3"],
        solver_images=7,
        curve_images=20,
    )
    bins = {
        f"val/timed_loss_t{sum(each['t']) / 2:.4g}": each["loss"] for each in result["time_bins"]
    }
    assert len(bins) == 8
    for name, loss in bins.items():
        assert float(row[name]) == pytest.approx(loss, rel=1e-5)
    assert float(row["val/timed_loss"]) == pytest.approx(sum(bins.values()) / 8, rel=1e-5)
    for name in ("cosine", "norm_ratio"):
        scored = result["estimators"]["heun-3"][name]
        assert float(row[f"val/{name}_heun-3"]) == pytest.approx(scored, rel=1e-5)


def test_an_estimator_that_can_not_be_validated_is_refused() -> None:
    for label, said in (("heum-4", "solver.name=heun"), ("fitted-4", "it is fitted after")):
        with pytest.raises(UserError, match=said):
            config(evaluation=EvaluationConfig(estimators=[label]))
