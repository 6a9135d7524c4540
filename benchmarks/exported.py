"""Exported graphs of the demo's run beside the package, on one thread: bytes and time an image.

`outputs/demo` has to be there (`make demo`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import interleaved, result
from blip3o_lit import BLIP3oInference
from blip3o_lit.config.commands import ExportConfig
from blip3o_lit.export import export

RUN = Path("outputs/demo")
IMAGES = 8
GRAPHS = {"mean": {}, "heun-4": {"solver": "heun", "num_inference_steps": 4}}
"""Name of a graph, and how the package is asked for the same."""


def run() -> list[dict[str, Any]]:
    """Time the mean and four steps of Heun as graphs and in the package."""
    import onnxruntime

    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as name:
        folder, cases = Path(name), dict[str, Callable[[], object]]()
        for form in ("torch_export", "onnx"):
            export(ExportConfig(str(RUN), str(folder / form), format=form, graph_solver="heun-4"))
        model = BLIP3oInference(RUN, device="cpu")
        condition, target = model.shape.condition, model.shape.target
        given = {
            "condition": torch.randn(IMAGES, condition.tokens, condition.width),
            "noise": torch.randn(IMAGES, target.tokens, target.width),
        }
        for graph, asked in GRAPHS.items():
            file = folder / "onnx" / f"{graph}.onnx"
            session = onnxruntime.InferenceSession(str(file), options)
            names = [each.name for each in session.get_inputs()]
            arrays = {name: given[name].numpy() for name in names}
            tensors = {name: given[name] for name in names}
            saved = folder / "torch_export" / f"{graph}.pt2"
            program = torch.export.load(saved).module()
            cases[f"{graph}, package"] = lambda asked=asked: model.generate(
                given["condition"], **asked
            )
            cases[f"{graph}, torch.export"] = lambda run=program, words=tensors: run(**words)
            cases[f"{graph}, ONNX Runtime"] = lambda run=session, words=arrays: run.run(None, words)
            print(f"  {graph}: {saved.stat().st_size:,} B .pt2, {file.stat().st_size:,} B .onnx")
        with torch.no_grad():
            seconds = interleaved(cases)
    for case, value in seconds.items():
        print(f"  {case:<24} {1e3 * value / IMAGES:6.2f} ms an image")
    ratio = seconds["heun-4, package"] / seconds["heun-4, ONNX Runtime"]
    return [result("exported/onnx_over_package", ratio, "x", 0.8)]
