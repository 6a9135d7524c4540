"""Samplers as CUDA graphs: their kernels are recorded once and launched at once from then on.

With small batches a GPU waits for the launch of each of some thousand kernels otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.base.condition import AnyCondition, tensors_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.flow.scheme import Scheme
from blip3o_lit.flow.solvers import Sample, sample


@dataclass(frozen=True)
class Recorded:
    graph: torch.cuda.CUDAGraph
    condition: AnyCondition
    noise_BND: Tensor
    result: Sample
    """Where the graph leaves its tokens."""


class Graphs:
    """The recorded samplers of one network, by solver and batch shape.

    The first batch of a shape runs without one and the second is recorded, so that a last, smaller
    batch costs nothing more. Words come in few lengths (`tokens.scales.STEP`), each with a graph.
    All share one pool of memory: what a graph leaves is copied at once.
    """

    def __init__(self, device: torch.device | str) -> None:
        if torch.device(device).type != "cuda":
            raise UserError(f"graphs=true needs a CUDA GPU, and this is on {device}: leave it out")
        self._recorded: dict[Any, Recorded | None] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def sample(
        self,
        objective: FlowObjective,
        network: Any,
        condition: AnyCondition,
        noise_BND: Tensor,
        solver: SolverConfig,
        scheme: Scheme | None,
    ) -> Sample:
        """Generate as `flow.solvers.sample` does; dopri5, which reads values, without a graph."""
        key = (repr(solver), *((x.shape, x.dtype) for x in tensors_of(condition)))
        inputs = (condition, noise_BND)
        if solver.name == "dopri5" or key not in self._recorded:
            self._recorded[key] = None
            return sample(objective, network, *inputs, solver, scheme=scheme)
        recorded = self._recorded[key]
        if recorded is None:
            graph, own = torch.cuda.CUDAGraph(), (condition.clone(), noise_BND.clone())
            with torch.cuda.graph(graph, pool=self._pool):
                result = sample(objective, network, *own, solver, scheme=scheme)
            recorded = Recorded(graph, *own, result)
            self._recorded[key] = recorded
        for own, given in zip(tensors_of(recorded.condition), tensors_of(condition)):
            own.copy_(given)
        recorded.noise_BND.copy_(noise_BND)
        recorded.graph.replay()
        return replace(recorded.result, x1_BND=recorded.result.x1_BND.clone())
