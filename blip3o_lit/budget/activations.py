"""Bytes that a training step holds, by rehearsing it on tensors that have shapes but no data.

A rehearsal runs the real network and loss and follows every storage from its birth to its death,
so it knows what each architecture and precision keeps.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blip3o_lit.base.condition import empty_condition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.precision import Precision


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations inside the context make."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self._known: set[int] = set()

    def watch(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        weakref.finalize(storage, self._died, key, size)

    def _died(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.watch(leaf, leaf.untyped_storage().nbytes())
        return out


class _FusedNorm(torch.autograd.Function):
    """Makes and keeps what a GPU's kernel does; its numbers mean nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)


class FusedNorms(TorchFunctionMode):
    """Puts a GPU's root mean square norm, one kernel, in the place of a CPU's, which are several.

    Those keep what lies between them, in fp32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is F.rms_norm:
            return _FusedNorm.apply(args[0])
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch holds between forward and backward, and while a block is at work."""

    fixed: int
    """Whatever the batch: copies of the weights in the format of autocast."""
    image: int
    """For each image."""

    def of(self, images: int, strategy: str) -> int:
        """Return the bytes of a micro-batch; FSDP2's weights in use are in autocast's format."""
        copies = 0 if strategy == "fsdp2" else self.fixed
        return copies + images * self.image


@lru_cache(maxsize=64)
def activations(
    model: ModelConfig,
    flow: FlowConfig,
    shape: PairShape,
    precision: Precision,
    device: str = "cpu",
    compiled: bool = False,
) -> Activations:
    """Measure what a network keeps for its backward pass on a kind of device.

    No device is touched: kernels are the CPU's but for norms, of which a GPU keeps less. What is
    kept grows by the same amount with each image and each block, so 2 and 3 blocks on 1 and 2
    images tell it all. One block more stands for gradients on their way and, where some of it is
    recomputed, for that. A compiler is taken to keep what `model.activation_budget` allows.
    """
    budget = model.kept_activations
    if compiled and 0 < budget < 1:
        ends = [
            activations(replace(model, activation_budget=end), flow, shape, precision, device)
            for end in (0.0, 1.0)
        ]
        image = round(ends[0].image + budget * (ends[1].image - ends[0].image))
        return Activations(ends[1].fixed, image)

    def block_and_total(images: int, budget: float) -> tuple[int, int]:
        part = replace(model, activation_checkpointing=False, activation_budget=budget)
        two = _rehearse(replace(part, depth=2), flow, shape, images, precision, device)
        three = _rehearse(replace(part, depth=3), flow, shape, images, precision, device)
        block = three - two
        return block, two + block * (model.depth - 2)

    block_1, total_1 = block_and_total(1, budget)
    block_2, total_2 = block_and_total(2, budget)
    if budget < 1:
        block_1, _ = block_and_total(1, 1.0)
        block_2, _ = block_and_total(2, 1.0)
    image = total_2 - total_1
    return Activations(max(0, total_1 - image), image + block_2 - block_1)


def _rehearse(
    model: ModelConfig,
    flow: FlowConfig,
    shape: PairShape,
    images: int,
    precision: Precision,
    device: str,
) -> int:
    """Return the bytes alive after a forward pass of the whole network and its loss."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class CpuOnly(FakeTensorMode):
        # Without a GPU it would set up a stand-in for one, and autograd start a thread for it.
        avoid_device_init = False  # type: ignore[assignment]

    with torch.device("meta"):
        network = build_network(model, shape)
    network.to(precision.weights)
    with CpuOnly(allow_non_fake_inputs=True):
        network.to_empty(device="cpu")
        objective = FlowObjective(flow)
        live = LiveBytes()
        for tensor in (*network.parameters(), *network.buffers()):
            live.watch(tensor, 0)
        autocast = precision.autocast
        with live, FusedNorms() if device == "cuda" else nullcontext():
            # B images, N target tokens of width D
            target = shape.target
            raw = empty_condition(shape, images, torch.float16)
            raw_BND = torch.empty(images, target.tokens, target.width, dtype=torch.float16)
            condition, x1_BND = raw.float(), raw_BND.float()
            z_BND, t_B = torch.empty_like(x1_BND), torch.empty(images)
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                loss = objective.loss(network, condition, x1_BND, z_BND, t_B).total
            alive = live.now
        del loss  # it keeps the graph, and so the activations, alive until here
    return alive
