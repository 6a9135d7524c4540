"""Averages whose width is chosen after training: what is stored, and what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quick_run import config, differences, state

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.averages import averages
from blip3o_lit.checkpoints.snapshots import FOLDER, begin_snapshots
from blip3o_lit.checkpoints.weights import read_weights
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.config.trainer import CheckpointConfig, TrainerConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.export import ExportConfig, export
from blip3o_lit.models.power_average import decay, exponent, fit
from blip3o_lit.training.run import run_training

STEPS = 48


def kept(widths: list[float], steps: int = STEPS, **changes: Any) -> Any:
    optimizer = OptimizerConfig(lr=1e-2, ema_profiles=widths, ema_snapshots=8)
    trainer = TrainerConfig(max_steps=steps, log_every=8, accelerator="cpu")
    return config(
        optimizer=optimizer, trainer=trainer, checkpoint=CheckpointConfig(every=24), **changes
    )


def made(run: Path, width: float) -> dict[str, torch.Tensor]:
    file = run / "checkpoints" / "last.ckpt"
    found = averages(file, read_weights(file)[0], [width])[width]
    return {name.removeprefix("network."): value for name, value in found.network.items()}


def profile(run: Path, number: int, name: str = "last.ckpt") -> dict[str, torch.Tensor]:
    stored, prefix = checkpointing.load(run / "checkpoints" / name), f"profiles.{number}."
    return {
        name.removeprefix(prefix): value
        for name, value in stored["state_dict"].items()
        if name.startswith(prefix)
    }


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    both = [torch.cat([part[name].flatten() for name in sorted(part)]) for part in (a, b)]
    return float((both[0] - both[1]).norm() / both[1].norm())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same steps that keep other widths."""
    folder = tmp_path_factory.mktemp("averages")
    run_training(kept([0.05, 0.1]), folder / "stored", [])
    run_training(kept([0.075, 0.15]), folder / "direct", [])
    return folder


def test_exponents_are_those_of_the_paper() -> None:
    assert exponent(0.05) == pytest.approx(16.97, abs=0.01)
    assert exponent(0.10) == pytest.approx(6.94, abs=0.01)
    assert exponent(12**-0.5) == pytest.approx(0.0, abs=1e-9)


def test_a_running_average_is_its_profile() -> None:
    """With unit weights in place of parameters it gives the share of each step."""
    width, steps = 0.1, 40
    shares = np.zeros(steps)
    for step in range(1, steps + 1):
        unit = np.eye(steps)[step - 1]
        shares += (1 - decay(width, step)) * (unit - shares)
    edges = (np.arange(steps + 1) / steps) ** (exponent(width) + 1)
    np.testing.assert_allclose(shares, np.diff(edges), atol=1e-15)
    middle = (np.arange(steps) + 0.5) / steps
    spread = np.sqrt(shares @ middle**2 - (shares @ middle) ** 2)
    assert spread == pytest.approx(width, rel=0.01)


def test_a_fit_finds_what_is_stored_and_comes_close_to_what_lies_between() -> None:
    steps = [125 * number for number in range(1, 9)] * 2
    widths = [0.05] * 8 + [0.1] * 8
    exact = fit(widths, steps, 0.1, 1000)
    assert exact.missed < 1e-6
    np.testing.assert_allclose(exact.coefficients_K, np.eye(16)[15], atol=1e-6)
    between = [fit(widths, steps, width, 1000).missed for width in (0.06, 0.075, 0.12, 0.2)]
    assert max(between[:3]) < 0.02
    assert between[3] < 0.1
    more = fit([*widths, 0.2], [*steps, 1000], 0.2, 1000)
    assert more.missed < 1e-6, "one more stored average never makes it worse"


def test_profiles_change_nothing_else(runs: Path) -> None:
    a, b = (state(runs / run / "checkpoints" / "last.ckpt") for run in ("stored", "direct"))
    for part in (a, b):
        for name in [name for name in part["state_dict"] if name.startswith("profiles.")]:
            del part["state_dict"][name]
    assert not differences(a, b)


@pytest.mark.parametrize(("width", "number"), [(0.075, 0), (0.15, 1)])
def test_a_width_made_afterwards_is_the_one_kept_during_training(
    runs: Path, width: float, number: int
) -> None:
    kept_then = profile(runs / "direct", number)
    nearest = distance(profile(runs / "stored", 1), kept_then)
    assert distance(made(runs / "stored", width), kept_then) < min(1e-3, nearest / 10)
    assert distance(made(runs / "direct", width), kept_then) < 1e-6


def test_the_swept_score_is_that_of_the_run_with_this_decay(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quick: dict[str, Any] = {"baselines": "none", "solvers": [], "curve": [], "samples": 0}
    found = {}
    for run in ("stored", "direct"):
        source = str(runs / run)
        asked = EvaluateConfig(ckpt=source, ema=[0.075, 0.15], device="cpu", **quick)
        found[run] = evaluate(asked)["averages"]
    said = capsys.readouterr().out
    assert "ema 0.075: mean cosine" in said
    assert "best: " in said
    for name in ("0.075", "0.15"):
        one, other = (found[run]["scores"][name] for run in ("stored", "direct"))
        assert one["cosine"] == pytest.approx(other["cosine"], abs=5e-4)
        assert other["missed"] < 1e-6 < one["missed"]
    scores = found["stored"]["scores"]
    assert found["stored"]["best"] == max(scores, key=lambda name: scores[name]["cosine"])

    out = tmp_path / "exported"
    export(ExportConfig(ckpt=str(runs / "stored"), ema="0.075", out=str(out)))
    again = evaluate(
        EvaluateConfig(ckpt=str(out), out=str(tmp_path / "scored"), device="cpu", **quick)
    )
    assert again["estimators"]["mean"]["cosine"] == pytest.approx(
        scores["0.075"]["cosine"], abs=1e-6
    )
    assert "width 0.075 of the run" in (out / "README.md").read_text()
    export(ExportConfig(ckpt=str(runs / "stored"), ema="best", out=str(tmp_path / "best")))
    with pytest.raises(UserError, match=r"exported/model.safetensors holds one average alone"):
        export(ExportConfig(ckpt=str(out), ema="0.1", out=str(tmp_path / "third")))


def test_a_resumed_run_stores_the_very_files(tmp_path: Path) -> None:
    run = tmp_path / "resumed"
    asked = kept([0.05, 0.1])
    asked.checkpoint.keep = -1
    run_training(asked, run, [])
    before = {file.name: file.read_bytes() for file in sorted((run / FOLDER).iterdir())}
    assert [*before] == [f"step-{step:08d}.safetensors" for step in range(6, STEPS + 1, 6)]
    torn = run / FOLDER / ".step-00000048.safetensors.1f.tmp"
    torn.write_bytes(b"half")
    other = tmp_path / "other"
    asked.resume = str(run / "checkpoints" / "step-00000024.ckpt")
    run_training(asked, other, [])
    assert {file.name: file.read_bytes() for file in (other / FOLDER).iterdir()} == before
    ends = (state(folder / "checkpoints" / "last.ckpt") for folder in (run, other))
    assert not differences(*ends)
    begin_snapshots(run, 24, None)
    left = sorted(file.name for file in (run / FOLDER).iterdir())
    assert left == sorted(before)[:4], "what comes after the step that is gone on from is removed"
    with pytest.raises(UserError, match=r"optimizer.ema_profiles was \[0.05, 0.1\] there"):
        run_training(kept([], resume=asked.resume), tmp_path / "third", [])


@pytest.mark.parametrize(
    ("widths", "said"),
    [([0.4], "0.4 is no width"), ([0.1, 0.1], "names a width twice"), ([0.0], "0 is no width")],
)
def test_widths_that_no_average_has_are_refused(widths: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        OptimizerConfig(ema_profiles=widths)


def test_a_run_without_profiles_says_how_to_keep_them(tmp_path: Path, runs: Path) -> None:
    run_training(config(), tmp_path / "run", [])
    asked = ExportConfig(ckpt=str(tmp_path / "run"), ema="0.1", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"train with optimizer.ema_profiles=\[0.05,0.1\]"):
        export(asked)
    asked.ema = "best"
    with pytest.raises(UserError, match="no evaluation of these weights that compares averages"):
        export(asked)
    far = ExportConfig(ckpt=str(runs / "stored"), ema="0.005", out=str(tmp_path / "out"))
    with pytest.raises(UserError, match="give width 0.005 to .* only"):
        export(far)
    with pytest.raises(UserError, match="ema=bset must be a width"):
        ExportConfig(ckpt="x", ema="bset", out="y")
