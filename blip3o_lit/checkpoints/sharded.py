"""Checkpoints as folders: each process writes its own share, any number of processes reads them.

The tensors are torch's distributed checkpoint in safetensors files, which hold no code; the rest,
with size and CRC-32 of each of those files, is `plain.ckpt`. A folder gets its name when all of it
is on the disk.
"""

import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from blip3o_lit.checkpoints.in_place import (
    TEMPORARY,
    not_written,
    put_in_place,
    remove,
    save_synced,
)
from blip3o_lit.config.errors import UserError
from blip3o_lit.models.initialisation import shard_like

PLAIN = "plain.ckpt"
_CHUNK = 1 << 24


def take_tensors(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """Remove weights and optimizer state from a checkpoint and return them by flat names."""
    tensors = {f"state_dict/{name}": t for name, t in checkpoint.pop("state_dict").items()}
    for number, state in enumerate(checkpoint["optimizer_states"]):
        for index, values in state.pop("state").items():
            tensors |= {f"optimizer/{number}/{index}/{key}": t for key, t in values.items()}
    return tensors


def put_tensors(checkpoint: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Undo `take_tensors`."""
    checkpoint["state_dict"] = {}
    for state in checkpoint["optimizer_states"]:
        state["state"] = {}
    for flat, tensor in tensors.items():
        kind, _, name = flat.partition("/")
        if kind == "state_dict":
            checkpoint["state_dict"][name] = tensor
        else:
            number, index, key = name.split("/")
            states = checkpoint["optimizer_states"][int(number)]["state"]
            states.setdefault(int(index), {})[key] = tensor


def save(checkpoint: dict[str, Any], path: Path, group: Any = None) -> None:
    """Write a checkpoint of sharded tensors; called by every process of a group on the CPU.

    Each process measures the file that it wrote: a shared folder may list it late for others.
    """
    from torch.distributed.checkpoint import state_dict_saver
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    class Writer(HuggingFaceStorageWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            written = super().write_data(plan, planner)
            written.wait()
            names = {result.storage_data.relative_path for result in written.value()}
            self.sums = {name: measure(temporary / name) for name in names}
            return written

    rank, world = dist.get_rank(), dist.get_world_size()
    tensors = take_tensors(checkpoint)
    checkpoint["tensors"] = list(tensors)  # safetensors files forget the order.
    temporary = path.with_name(TEMPORARY.format(path.name))
    try:
        if rank == 0:
            remove(temporary)
            temporary.mkdir(parents=True)
        dist.barrier(group)
        writer = Writer(str(temporary), save_distributed=True)
        state_dict_saver.save(tensors, storage_writer=writer, process_group=group)
        sums: list[Any] = [None] * world
        dist.all_gather_object(sums, writer.sums, group)
        if rank == 0:
            checkpoint["files"] = {name: pair for part in sums for name, pair in part.items()}
            save_synced(checkpoint, temporary / PLAIN)
            put_in_place(temporary, path)
        dist.barrier(group)
    except (OSError, RuntimeError, CheckpointException) as error:
        raise not_written(path, error) from error


def measure(file: Path) -> list[int]:
    """Return a file's size and CRC-32."""
    size = total = 0
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            size, total = size + len(chunk), zlib.crc32(chunk, total)
    return [size, total]


def read(folder: Path, plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Put the whole tensors of a folder into the content of its `plain.ckpt`, in place.

    Only tensors whose flat name begins with `prefix` are read.
    """
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    stored: Any = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype)
        for name in plain.pop("tensors")
        if name.startswith(prefix)
    }
    state_dict_loader.load(tensors, storage_reader=reader, no_dist=True)
    put_tensors(plain, tensors)
    del plain["files"]
    return plain


def read_shards(
    folder: Path, plain: dict[str, Any], module: nn.Module, optimizers: list[Optimizer]
) -> dict[str, Any]:
    """Load this process's share of a folder; returns the checkpoint without weights."""
    from torch.distributed.checkpoint import state_dict_loader
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(folder))
    tensors = {f"state_dict/{name}": tensor for name, tensor in module.state_dict().items()}
    stored: Any = reader.read_metadata().state_dict_metadata
    for name in plain["tensors"]:
        kind, *place = name.split("/")
        if kind == "optimizer":
            parameter = parameters_of(optimizers[int(place[0])])[int(place[1])].detach()
            whole = stored[name].size == parameter.shape
            like = parameter if whole else torch.empty(stored[name].size)
            tensors[name] = torch.zeros_like(like, dtype=stored[name].properties.dtype)
    state_dict_loader.load(tensors, storage_reader=reader)
    put_tensors(plain, tensors)
    _load_optimizers(plain, optimizers)
    del plain["state_dict"]
    return plain


def spread(
    checkpoint: dict[str, Any], module: nn.Module, optimizers: list[Optimizer]
) -> dict[str, Any]:
    """Load this process's share of a whole checkpoint; returns it without weights."""
    whole = checkpoint.pop("state_dict")
    for name, tensor in module.state_dict().items():
        if name not in whole or whole[name].shape != tensor.shape:
            raise UserError(f"the checkpoint has no {name} of shape {tuple(tensor.shape)}")
        tensor.detach().copy_(shard_like(whole[name], tensor))
    for optimizer, state in zip(optimizers, checkpoint["optimizer_states"]):
        for index, parameter in enumerate(parameters_of(optimizer)):
            for key, value in state["state"].get(index, {}).items():
                own = value.clone()
                if value.shape == parameter.shape:
                    own = torch.empty_like(parameter.detach(), dtype=value.dtype)
                    own.copy_(shard_like(value, parameter))
                state["state"][index][key] = own
    _load_optimizers(checkpoint, optimizers)
    return checkpoint


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return an optimizer's parameters in the order by which its state dict numbers them."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _load_optimizers(checkpoint: dict[str, Any], optimizers: list[Optimizer]) -> None:
    for optimizer, state in zip(optimizers, checkpoint.pop("optimizer_states")):
        optimizer.load_state_dict(state)
