"""Muon on shards: the steps of one process, by two exchanges for each shape of matrix."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from blip3o_lit.models.muon import muon_step
from blip3o_lit.models.precision import bf16_is_faster

SHAPES = [(10, 6)] * 5 + [(6, 12)] * 3 + [(3, 5)]
"""Rows that 4 processes don't divide, stacks of fewer matrices than processes, a process without
rows."""
MESHES = {"4": (4,), "2 x 2": (2, 2)}


def steps(mesh: Any) -> tuple[list[torch.Tensor], dict[Any, int]]:
    """Take three steps, the second skipped; return weights and momenta, and what was exchanged."""
    generator = torch.Generator().manual_seed(0)
    places = [Shard(0)] if mesh is None or mesh.ndim == 1 else [Replicate(), Shard(0)]

    def drawn(shape: tuple[int, int]) -> torch.Tensor:
        whole = torch.randn(shape, generator=generator)
        return whole if mesh is None else distribute_tensor(whole, mesh, places)

    weights = [drawn(shape).requires_grad_() for shape in SHAPES]
    group = {"params": weights, "lr": 0.1, "weight_decay": 0.1, "momentum": 0.95}
    state: dict[Any, dict[str, torch.Tensor]] = {weight: {} for weight in weights}
    counts: dict[Any, int] = {}
    for found_inf in (0.0, 1.0, 0.0):
        for weight in weights:
            weight.grad = drawn(tuple(weight.shape))
        with CommDebugMode() as exchanged:
            muon_step(group, state, torch.tensor(found_inf))
        counts = exchanged.get_comm_counts()
    made = [*weights, *(state[weight]["momentum_buffer"] for weight in weights)]
    return [it.full_tensor() if isinstance(it, DTensor) else it for it in made], counts


def rank_of_four(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=4)
    names = ("replicate", "shard")
    for name, size in MESHES.items():
        mesh = init_device_mesh("cpu", size, mesh_dim_names=names[-len(size) :])
        made, counts = steps(mesh)
        if rank == 0:
            calls = {str(kind): number for kind, number in counts.items()}
            torch.save({"made": [it.detach() for it in made], "calls": calls}, f"{folder}/{name}")
    dist.destroy_process_group()


def test_shards_step_as_one_process_by_two_exchanges_per_shape(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=rank_of_four, args=(r, str(tmp_path))) for r in range(4)]
    for rank in ranks:
        rank.start()
    expected, none = steps(None)
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert not none
    for name in MESHES:
        found = torch.load(tmp_path / name, weights_only=True)
        assert sum(found["calls"].values()) == 2 * len(set(SHAPES)), found["calls"]
        # In bf16 the last bits of a product depend on how many matrices are multiplied at once.
        near = 5e-3 if bf16_is_faster("cpu") else 1e-5
        for one, other in zip(found["made"], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=near)
