"""A translator as graphs that run without this package: `torch.export` programs or ONNX files.

Each graph goes from raw condition tokens to raw target tokens, token scales included, for batches
of any size: one is the posterior mean, one a solver of few steps. Both take the noise; the mean's
graph leaves it out where it does not depend on it.
Shape suffixes: B images, M condition tokens, C condition width, N target tokens, D target width.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from blip3o_lit.base.files import replacing, write_json
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.solver import (
    SolverConfig,
    check_solver,
    solver_from_label,
    started_later,
)
from blip3o_lit.flow.solvers import sample
from blip3o_lit.translation.translator import Translator

GRAPHS_FILE = "graphs.json"
ENDINGS = {"torch_export": "pt2", "onnx": "onnx"}
TOLERANCE = 1e-5
"""Largest error of a graph, as a share of the largest number that comes out."""
TRACED, TRIED = 2, 3
"""Images of the batch that a graph is traced with, and of the one that it is tried with."""
LARGEST_FILE = 1.9e9
"""Bytes of weights that an ONNX file itself can hold; its format ends at 2 GiB."""
Run = Callable[[dict[str, Tensor]], Tensor]


class Graph(nn.Module):
    """One estimator as a function of tensors alone."""

    def __init__(self, translator: Translator, solver: SolverConfig, takes_noise: bool) -> None:
        super().__init__()
        self.translator, self.solver, self.takes_noise = translator, solver, takes_noise

    def forward(self, condition: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return raw target tokens [B, N, D] in fp32."""
        parts = self.translator
        if noise is None:
            mean_ND = parts.target_standardizer.mean_NC
            noise = torch.zeros_like(mean_ND).expand(condition.shape[0], -1, -1)
        standardised = parts.standardised(condition)
        scheme = parts.fitted.scheme(self.solver) if self.solver.name == "fitted" else None
        generated = sample(
            parts.objective, parts.network, standardised, noise, self.solver, scheme=scheme
        )
        return parts.target_standardizer.restore(generated.x1_BND)


def write_graphs(loaded: Loaded, out: Path, form: str, label: str) -> dict[str, list[str]]:
    """Write the graphs of the posterior mean and of a solver into `out`; return their inputs.

    Every file is read again by the library that runs it and has to agree with this package.

    Raises:
        UserError: If the condition has words, a package is missing, or a graph does not compute
            what the package does.
    """
    if loaded.shape.words is not None:
        raise UserError(
            f"format={form} knows grids alone, and this condition has words: leave format= out"
        )
    if form == "onnx":
        _need("onnx", "onnxscript", "onnxruntime")
    translator, flow = loaded.translator.float(), loaded.config.flow
    translator.autocast = None
    written: dict[str, list[str]] = {}
    solvers = [SolverConfig()] if flow.has_mean else []
    solvers.append(started_later(flow, solver_from_label(label), loaded.config.solver.start))
    out.mkdir(parents=True, exist_ok=True)
    for solver in solvers:
        check_solver(flow, solver)
        blind = flow.prediction == "sample" and flow.time_zero_input == "zero"
        graph = Graph(translator, solver, not (solver.name == "mean" and blind)).eval()
        name = f"{solver.label.replace('@', '-guided-')}.{ENDINGS[form]}"
        traced, tried = (_inputs(loaded, graph, images) for images in (TRACED, TRIED))
        with torch.no_grad():
            wanted_BND = graph(**tried)  # first: its numbers of path and grid are then kept
            run = _written(graph, traced, out / name, form)
        error = float((run(tried) - wanted_BND).abs().max() / wanted_BND.abs().max())
        if not error <= TOLERANCE:
            raise UserError(f"{out / name}: the graph's tokens are off by {error:.1e}: not usable")
        written[name] = list(tried)
    write_json(out / GRAPHS_FILE, {"graphs": written, "shape": loaded.shape.to_dict()})
    (out / "README.md").write_text(_card(loaded, written, form), "utf-8")
    return written


def _card(loaded: Loaded, graphs: dict[str, list[str]], form: str) -> str:
    """Return the README.md of a folder of graphs: what goes in and comes out, how to call them."""
    source, target = loaded.shape.grid, loaded.shape.target
    name, inputs = next(iter(graphs.items()))
    given = ", ".join(f'"{name}": {name}' for name in inputs)
    call = f'''session = onnxruntime.InferenceSession("{name}")
(tokens,) = session.run(["tokens"], {{{given}}})  # NumPy arrays'''
    if form == "torch_export":
        call = f'''run = torch.export.load("{name}").module()
tokens = run({", ".join(f"{name}={name}" for name in inputs)})'''
    rows = "\n".join(f"| `{name}` | {', '.join(words)} |" for name, words in graphs.items())
    return f"""# {loaded.facts.get("name", loaded.folder.resolve().name)}

Graphs from condition tokens to target tokens, both fp32 in the towers' own scale: they need no
package but the one that runs them.

| graph | inputs |
|---|---|
{rows}

- `condition`: [B, {source.tokens}, {source.width}]
- `noise`: [B, {target.tokens}, {target.width}], standard normal: another one, another sample
- `tokens`, what comes out: [B, {target.tokens}, {target.width}]; B is free

```python
import {"torch" if form == "torch_export" else "onnxruntime"}

{call}
```
"""


def _inputs(loaded: Loaded, graph: Graph, images: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(images)
    source, target = loaded.shape.grid, loaded.shape.target
    standard_BMC = torch.randn(images, source.tokens, source.width, generator=random)
    scale = loaded.translator.condition_standardizer
    assert scale is not None
    raw = scale.restore(standard_BMC)
    noise = torch.randn(images, target.tokens, target.width, generator=random)
    return {"condition": raw} | ({"noise": noise} if graph.takes_noise else {})


def _written(graph: Graph, traced: dict[str, Tensor], file: Path, form: str) -> Run:
    """Write a graph; return a function that runs what was written."""
    batch = torch.export.Dim("batch")
    program = torch.export.export(
        graph, (), kwargs=traced, dynamic_shapes={name: {0: batch} for name in traced}, strict=False
    )
    if form == "torch_export":
        with replacing(file) as temporary, temporary.open("wb") as opened:
            torch.export.save(program, opened)
        module = torch.export.load(file).module()
        return lambda inputs: module(**inputs)
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        exported = torch.onnx.export(
            program, input_names=[*traced], output_names=["tokens"], dynamo=True, verbose=False
        )
    assert exported is not None
    if sum(weight.nbytes for weight in graph.state_dict().values()) < LARGEST_FILE:
        with replacing(file) as temporary:
            exported.save(str(temporary), external_data=False)
    else:  # the weights go into a file of their own, whose name stands in the graph
        exported.save(str(file), external_data=True)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(
        session.run(["tokens"], {name: tensor.numpy() for name, tensor in inputs.items()})[0]
    )


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UserError(f"format=onnx needs {', '.join(missing)}: pip install 'blip3o-lit[onnx]'")
