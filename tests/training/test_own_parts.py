"""Doors for Lightning's own: trainer.extra, callbacks, loggers; each through the real command."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from lightning import Trainer
from quick_run import config, differences, state

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.trainer import INSTEAD, TrainerConfig
from blip3o_lit.export import ExportConfig, export
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.train import main
from blip3o_lit.training.own_parts import check_plain
from blip3o_lit.training.run import run_training
from blip3o_lit.training.trainer_arguments import cut_by, passed

SMALL = [
    *("experiment=linear_gaussian", "model.width=16", "model.depth=1", "batch_size=16"),
    *("trainer.max_steps=4", "trainer.log_every=1", "trainer.accelerator=cpu", "logger=csv"),
    *("data.linear_gaussian.images=72", "data.linear_gaussian.validation_images=20"),
    *("evaluation.every=2", "evaluation.images=20", "checkpoint.every=2", "precision=fp32"),
]
BY_HAND = (
    "MLflow is an extra outside the lock; by hand: pip install --target /tmp/mlflow mlflow-skinny; "
    "PYTHONPATH=/tmp/mlflow python -m pytest tests/training/test_own_parts.py -k mlflow"
)
OWN = """
from lightning import Callback
from pathlib import Path

class Counter(Callback):
    def __init__(self, by: int = 1) -> None:
        self.by, self.count = by, 0
    def state_dict(self):
        return {"count": self.count}
    def load_state_dict(self, state):
        self.count = state["count"]
    def on_train_batch_end(self, *args):
        self.count += self.by

def touch(path: str):
    Path(path).touch()
    return Counter()
"""


def train(patch: pytest.MonkeyPatch, *words: str) -> int:
    patch.setattr(sys, "argv", ["train", *SMALL, *words])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own on the path."""
    (tmp_path / "own_parts_of_a_test.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_parts_of_a_test"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("trainer.extra.limit_train_bacthes=3", "trainer.extra.limit_train_batches?"),
        ("trainer.extra.profiler=smiple", "did you mean trainer.extra.profiler=simple?"),
        ("trainer.extra.max_stesp=3", "did you mean trainer.max_steps?"),
        ("trainer.extra.accumulate_grad_batches=2", "use micro_batch_size"),
        ("+trainer.extra.val_check_interval=2", "use evaluation.every"),
        ("trainer.extra.limit_train_batches=many", "Lightning refuses"),
        ("callbacks.x.patience=2", "give callbacks.x._target_=PACKAGE.CLASS"),
        ("+callbacks.x._target_=nowhere_at_all.X", "no module nowhere_at_all"),
        ("+callbacks.x._target_=lightning.pytorch.callbacks.Tiemr", "callbacks.Timer?"),
        ("+callbacks.x._target_=pathlib.Path", "is no Callback of Lightning's"),
        ("logger.x._target_=lightning.pytorch.callbacks.Timer", "is no Logger of Lightning's"),
        ("logger.wandb_projct=x", "did you mean logger.wandb_project?"),
    ],
)
def test_a_wrong_word_is_one_line(
    word: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert train(monkeypatch, word, f"hydra.run.dir={tmp_path / 'run'}") == 2
    error = capfd.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1


def test_a_wrong_argument_of_a_class_is_answered_with_the_right_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    words = ["callbacks=early_stopping", "callbacks.early_stopping.patiense=2"]
    assert train(monkeypatch, *words, f"hydra.run.dir={run}") == 2
    assert "did you mean patience?" in capfd.readouterr().err
    assert not run.exists(), "a refused command leaves nothing behind"


def test_every_argument_of_the_trainer_passes_or_names_another_key() -> None:
    names = inspect.signature(Trainer.__init__).parameters.keys() - {"self"}
    assert INSTEAD.keys() <= names
    assert passed().keys() == names - INSTEAD.keys()
    for name, key in INSTEAD.items():
        with pytest.raises(UserError, match=f"trainer.extra.{name} is set by this project"):
            TrainerConfig(extra={name: 1})
        assert key


def test_whole_runs_are_not_called_cut() -> None:
    whole = {"limit_train_batches": 1.0, "fast_dev_run": False, "barebones": None, "max_time": None}
    assert cut_by({**whole, "profiler": "simple", "limit_val_batches": 2}) == {
        "limit_val_batches": 2
    }
    assert cut_by({"limit_train_batches": 1, "barebones": True}).keys() == {
        "limit_train_batches",
        "barebones",
    }


@pytest.mark.parametrize(
    ("word", "step"), [("limit_train_batches=3", 3), ("fast_dev_run=2", 2), ("barebones=true", 4)]
)
def test_the_record_of_a_cut_run_says_so_and_it_goes_on_whole(
    word: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = f"hydra.run.dir={tmp_path}"
    assert train(monkeypatch, run, f"trainer.extra.{word}") == 0
    name = word.partition("=")[0]
    for file in ("result.json", "environment.json"):
        assert json.loads((tmp_path / file).read_text())["cut"].keys() == {name}
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["finished"], result["step"]) == (False, step)
    if step < 4:
        assert train(monkeypatch, run, "resume=auto") == 0
        result = json.loads((tmp_path / "result.json").read_text())
        assert (result["finished"], result["step"], "cut" in result) == (True, 4, False)


def test_profiler_callbacks_and_loggers_of_lightning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [f"hydra.run.dir={tmp_path}", "trainer.extra.profiler=simple"]
    words += ["callbacks=[model_summary,early_stopping]", "callbacks.early_stopping.patience=1"]
    words += ["callbacks.early_stopping.mode=max"]  # the error falls: it stops at the second look
    words += ["evaluation.every=1", "logger.table._target_=lightning.pytorch.loggers.CSVLogger"]
    assert train(monkeypatch, *words) == 0
    said = capfd.readouterr().out
    assert "stopped early at step 2 of 4: by a callback" in said
    assert "Trainable params" in said
    assert "run_training_batch" in (tmp_path / "profile" / "fit-simple.txt").read_text()
    (table,) = (tmp_path / "table").rglob("metrics.csv")
    assert "val/cosine" in table.read_text()
    assert "linear_gaussian" in (table.parent / "hparams.yaml").read_text()


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason=BY_HAND)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert train(monkeypatch, f"hydra.run.dir={tmp_path}", "logger=[csv,mlflow]") == 0
    (values,) = (tmp_path / "mlflow").rglob("metrics/val/cosine")
    assert len(values.read_text().splitlines()) == 2
    assert list((tmp_path / "mlflow").rglob("params/batch_size"))


def test_the_state_of_a_callback_is_resumed_bit_for_bit(tmp_path: Path, own_module: str) -> None:
    parts: dict[str, Any] = {"mine": {"_target_": f"{own_module}.Counter", "by": 3}}
    run_training(config(callbacks=parts), tmp_path / "straight", [])
    half = tmp_path / "straight" / "checkpoints" / "step-00000006.ckpt"
    run_training(config(callbacks=parts, resume=str(half)), tmp_path / "resumed", [])
    a, b = (state(tmp_path / run / "checkpoints" / "last.ckpt") for run in ("straight", "resumed"))
    assert not differences(a, b)
    assert a["callbacks"]["Counter"] == {"count": 36}


def test_a_state_that_no_checkpoint_can_hold_is_refused() -> None:
    check_plain({"A": {"x": [1, (2.0, None)], "y": {"z": "text"}}})
    with pytest.raises(UserError, match="callback B: its state holds a PosixPath"):
        check_plain({"B": {"x": [Path("x")]}})


def test_a_target_in_a_checkpoint_is_never_instantiated(tmp_path: Path, own_module: str) -> None:
    """Resumed, evaluated and exported, a hostile record stays a record."""
    run, touched = tmp_path / "run", tmp_path / "touched"
    run_training(config(), run, [])
    hostile = {"_target_": f"{own_module}.touch", "path": str(touched)}
    for name in ("step-00000006.ckpt", "best.ckpt"):
        file = run / "checkpoints" / name
        content = checkpointing.load(file)
        stored = content["blip3o"]["config"]
        stored["callbacks"] = {"evil": dict(hostile)}
        stored["logger"]["extra"] = {"evil": dict(hostile)}
        checkpointing.write(content, file)
    half = run / "checkpoints" / "step-00000006.ckpt"
    run_training(config(resume=str(half)), tmp_path / "resumed", [])
    out = str(tmp_path / "exported")
    export(ExportConfig(ckpt=str(half), out=out))
    assert own_module in Path(out, "config.json").read_text()
    settings: dict[str, Any] = {"baselines": "none", "solvers": [], "curve": [], "samples": 0}
    for source in (str(half), out):
        EvaluateConfig(ckpt=source)
        BLIP3oInference(source, "cpu").evaluate_model(
            tokens=str(checkpointing.about(half)["tokens"]["path"]), **settings
        )
    assert not touched.exists()
    run_training(config(callbacks={"evil": hostile}), tmp_path / "own", [])
    assert touched.exists(), "the user's own config does instantiate it"
