"""Generating with heun-10 on a CUDA GPU: the whole sampler, all evaluations, as one CUDA graph.

Its CUDA part has never run: it is a benchmark of its own, so that nothing is lost with it.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu import seconds_a_call, sized
from benchmarks.training import SHAPE
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.solvers import sample
from blip3o_lit.models.network_of import build_network


def run() -> list[dict[str, Any]]:
    """Print images a second, eager and as a graph; nothing is held against a target."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = 8 if device.type == "cuda" else 2
    with torch.device(device):
        network, objective = (
            build_network(sized("base", device), SHAPE),
            FlowObjective(FlowConfig()),
        )
        condition = torch.randn(batch, 256, 4096)
        noise_BND = torch.randn(batch, 256, 1024)

    def generate() -> None:
        # Weights are cast inside the graph: a cache from outside it would not be replayed.
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
            sample(objective, network, condition, noise_BND, SolverConfig("heun", 10))

    eager = seconds_a_call(generate, device, 5)
    line = f"  gpu/base heun-10, batch {batch}: eager {batch / eager:.1f} images/s"
    if device.type != "cuda":
        print(f"{line}; a CPU has no graphs")
        return []
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            generate()
    except RuntimeError as error:
        print(f"{line}; not captured: {str(error).splitlines()[0]}")
        return []
    replayed = seconds_a_call(graph.replay, device, 5)
    print(f"{line}, one CUDA graph {batch / replayed:.1f} images/s")
    return []
