"""FSDP2: weights, gradients, optimizer state and weight average sharded by block.

Lightning calls it ModelParallelStrategy. Its defaults would be tensor parallelism, and its way of
saving numbers the optimizer's states by the module's parameters, not by the optimizer's: here
every one of them is data-parallel, and checkpoints are this project's own in both kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.optim import Optimizer

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints import sharded as sharded_checkpoint
from blip3o_lit.checkpoints.background import Background
from blip3o_lit.config.trainer import StrategyConfig
from blip3o_lit.models.initialisation import is_sharded
from blip3o_lit.models.network import Network


def shard(network: Network, mesh: DeviceMesh, compute: torch.dtype | None) -> None:
    """Shard a network in place: each block, the modulation matrix, and the rest as one.

    Weights are gathered and used in the format `compute`, with None in their own; gradients are
    summed in fp32 either way.
    """
    # The times are not to be cast: bf16 has 8 bits of them.
    policy = MixedPrecisionPolicy(compute, torch.float32, cast_forward_inputs=False)
    modulation = getattr(network, "modulation", None)
    for part in (*network.blocks, modulation):
        if part is not None:
            fully_shard(part, mesh=mesh, mp_policy=policy)
    for block in network.blocks:
        register_fsdp_forward_method(block, "keys_values")
    # Freed after forward: an average left gathered would be validated as it was the time before.
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    register_fsdp_forward_method(network, "encode")


def whole(value: Any, keep: bool) -> Any:
    """Gather the sharded tensors of nested dicts and lists; called by every process.

    Without `keep`, a process gives each tensor up at once.
    """
    if isinstance(value, dict):
        return {key: whole(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    if not is_sharded(value):
        return value
    full = value.full_tensor()
    return full.cpu() if keep else None


class Fsdp2Strategy(ModelParallelStrategy):
    """FSDP2 over all processes, or in replicas; every other strategy can resume its checkpoints."""

    def __init__(
        self, config: StrategyConfig, backend: str, timeout: timedelta, saves: Background
    ) -> None:
        """Choose the checkpoints: one file, gathered on rank 0, or a folder of shards."""
        consolidated = config.consolidated
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=not consolidated,
            process_group_backend=backend,
            timeout=timeout,
        )
        self.consolidated, self.saves, self.replicas = consolidated, saves, config.replicas

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()
        self.mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:  # Neighbours, as the processes of a node are, share one replica.
            sizes = (self.replicas, self.world_size // self.replicas)
            names = ("replicate", "shard")
            self.mesh = init_device_mesh(self.root_device.type, sizes, mesh_dim_names=names)
        # Saving talks apart from training, and about objects: not over NCCL.
        self._saving = dist.new_group(backend="gloo", timeout=self._timeout)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep the gradients of a micro-batch whole: they are summed over processes once a step."""
        network: Any = self.lightning_module.network  # type: ignore[union-attr]
        network.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            network.set_requires_gradient_sync(True)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state = self.lightning_module.state_dict()
        return whole(state, self.is_global_zero) if self.consolidated else state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return whole(state, self.is_global_zero) if self.consolidated else state

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        path = Path(self.broadcast(str(filepath)))
        if not self.consolidated:
            content = self.saves.snapshot(checkpoint)
            self.saves.do(partial(sharded_checkpoint.save, content, path, self._saving))
        elif self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load this process's share of either kind; returns what is not a weight."""
        path = Path(self.broadcast(str(checkpoint_path)))
        plain = checkpointing.read_lazily(path)
        assert self.lightning_module is not None
        into = (self.lightning_module, self.optimizers)
        if path.is_dir():
            return sharded_checkpoint.read_shards(path, plain, *into)
        return sharded_checkpoint.spread(plain, *into)
