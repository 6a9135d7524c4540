"""Exported graphs give the package's tokens in a process that never imports it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documented import DOCS, blocks
from quick_run import config

from blip3o_lit import BLIP3oInference
from blip3o_lit.config.commands import ExportConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.solver import solver_from_label
from blip3o_lit.config.trainer import TrainerConfig
from blip3o_lit.export import export
from blip3o_lit.training.run import run_training

TORCH = """
import json, sys, numpy, torch
for name, words in json.load(open("graphs/graphs.json"))["graphs"].items():
    run = torch.export.load(f"graphs/{name}").module()
    inputs = {word: torch.from_numpy(numpy.load(f"{word}.npy")) for word in words}
    numpy.save(f"{name}.npy", run(**inputs).detach().numpy())
"""
ONNX = """
import json, sys, numpy, onnxruntime
for name, words in json.load(open("graphs/graphs.json"))["graphs"].items():
    run = onnxruntime.InferenceSession(f"graphs/{name}")
    inputs = {word: numpy.load(f"{word}.npy") for word in words}
    numpy.save(f"{name}.npy", run.run(["tokens"], inputs)[0])
"""
ALONE = "\nassert 'blip3o_lit' not in sys.modules\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_training(config(trainer=TrainerConfig(max_steps=4, accelerator="cpu")), folder, [])
    return folder


def alone(code: str, cwd: Path, *words: str) -> None:
    """Run code in a process of its own, away from the package."""
    command = [sys.executable, "-c", code + ALONE, *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("form", "code"), [("torch_export", TORCH), ("onnx", ONNX)])
def test_graphs_run_without_the_package(form: str, code: str, run: Path, tmp_path: Path) -> None:
    export(ExportConfig(str(run), str(tmp_path / "graphs"), form, "heun-2"))
    model = BLIP3oInference(run, "cpu")
    source, target = model.shape.condition, model.shape.target
    arrays = {
        "condition": 3 * torch.randn(5, source.tokens, source.width) + 1,
        "noise": torch.randn(5, target.tokens, target.width),
    }
    for name, tensor in arrays.items():
        np.save(tmp_path / f"{name}.npy", tensor.numpy())
    facts = json.loads((tmp_path / "graphs" / "graphs.json").read_text())
    ending = {"torch_export": "pt2", "onnx": "onnx"}[form]
    assert facts["graphs"] == {
        f"mean.{ending}": ["condition"],
        f"heun-2.{ending}": ["condition", "noise"],
    }
    assert f"mean.{ending}" in (tmp_path / "graphs" / "README.md").read_text()
    alone(code, tmp_path)
    for label in ("mean", "heun-2"):
        solver = solver_from_label(label)
        ids_B = torch.arange(5)
        true = model.translator.generate(arrays["condition"], ids_B, 0, solver, arrays["noise"])
        tokens = torch.from_numpy(np.load(tmp_path / f"{label}.{ending}.npy"))
        torch.testing.assert_close(tokens, true.x1_BND, rtol=1e-5, atol=1e-5)
    if form == "onnx":  # the page's script
        script = blocks(DOCS / "export.md", "python")[1]
        assert len(script.splitlines()) < 50
        alone(script, tmp_path, "graphs", "condition.npy", "clip.npy", "heun-2.onnx")
        assert np.load(tmp_path / "clip.npy").shape == (5, target.tokens, target.width)


def test_what_no_graph_can_be_made_of_is_refused(tmp_path: Path) -> None:
    for settings, said in (
        ({"format": "onxn"}, "did you mean format=onnx"),
        ({"graph_solver": "dopri5"}, "name one of fixed steps"),
        ({"graph_solver": "heum-2"}, "did you mean solver.name=heun"),
        ({"format": "onnx", "push_to_hub": "a/b"}, "push_to_hub takes format=safetensors"),
    ):
        with pytest.raises(UserError, match=said):
            ExportConfig(ckpt="run", out=str(tmp_path), **settings)
