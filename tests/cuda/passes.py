"""Kernels of a step of `base` in bf16, and bytes that its passes move: passes.py [compiled].

Passes are all operations but matrix products and attention; their bytes are those of tensors read
and written. Of compiled blocks the bytes are Inductor's own count. Prints a JSON.
"""

import collections
import json
import sys
from dataclasses import replace

import torch
from on_shim import Trace
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.training import SHAPE, model_config
from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.flow import draws
from blip3o_lit.flow.draws import Stream
from blip3o_lit.flow.objective import FlowObjective
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer
from blip3o_lit.tokens.statistics import Standardizer
from blip3o_lit.training.ema import update_averages

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "linear")
FREE = ("empty", "detach", "_unsafe_view", "new_empty")


class Bytes(TorchDispatchMode):
    """Counts the bytes that passes read and write, by operation."""

    def __init__(self):
        super().__init__()
        self.by = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not (func.is_view or name.startswith(FREE + PRODUCTS)):
            leaves = tree_leaves((args, kwargs, out))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_cuda]
            self.by[name] += sum({(t.data_ptr(), t.numel()): _size(t) for t in tensors}.values())
        return out


def _size(tensor):
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Step:
    """A step as training takes it, on tokens as they are stored."""

    def __init__(self):
        with torch.device("cuda"):
            self.network = build_network(model_config("base"), SHAPE)
            self.average = build_network(model_config("base"), SHAPE).requires_grad_(False)
        self.objective = FlowObjective(FlowConfig())
        self.scales = [
            Standardizer.identity(side).cuda() for side in (SHAPE.condition, SHAPE.target)
        ]
        self.optimizer = make_optimizer(self.network, OptimizerConfig())

    def loss(self, images):
        sides = (SHAPE.condition, SHAPE.target)
        raw = [torch.empty(images, s.tokens, s.width, dtype=torch.float16).cuda() for s in sides]
        condition, x1_BND = (scale.standardise(x) for scale, x in zip(self.scales, raw))
        who = torch.arange(images), torch.zeros(images, dtype=torch.int64)
        shape = tuple(x1_BND.shape[1:])
        z_BND = draws.noise(0, Stream.TRAINING_NOISE, *who, shape, device=x1_BND.device)
        t_B = torch.rand(images, device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            return self.objective.loss(self.network, condition, x1_BND, z_BND, t_B).total


def measured(step):
    """Return the kernels of each part of a step, and the bytes that an image adds to its passes."""
    moved, kernels = [], {}
    for images in (4, 8):
        for counting in (False, True):
            parts = {name: Trace() for name in ("forward", "backward", "rest")}
            with Bytes() if counting else torch.enable_grad():
                mode = torch.utils._python_dispatch._get_current_dispatch_mode()
                with parts["forward"]:
                    loss = step.loss(images)
                with parts["backward"]:
                    loss.backward()
            with parts["rest"]:
                norm = torch.nn.utils.get_total_norm([p.grad for p in step.network.parameters()])
                torch.nn.utils.clip_grads_with_norm_(step.network.parameters(), 1.0, norm)
                step.optimizer.step()
                step.optimizer.zero_grad()
                update_averages([step.average], step.network, [0.9])
            if counting:
                moved.append(mode.by)
            else:
                kernels = {name: trace.kernels for name, trace in parts.items()}
    by = {name: (size - moved[0][name]) / 4e6 for name, size in moved[1].items()}
    return kernels, by


def compiled(step):
    """Return the kernels of a step with compiled blocks, those that can be one combined."""
    step.network.config = replace(step.network.config, compile="combined")
    step.network.compile_blocks()
    for _ in range(2):
        parts = {name: Trace() for name in ("forward", "backward")}
        with parts["forward"]:
            loss = step.loss(4)
        with parts["backward"]:
            loss.backward()
        step.optimizer.zero_grad()
    return {name: trace.kernels for name, trace in parts.items()}


def shown(kernels):
    return {name: sum(each.values()) for name, each in kernels.items()}


step = Step()
kernels, by = measured(step)
found = {"megabytes": sum(by.values()), "kernels": shown(kernels)}
if "compiled" in sys.argv:
    found["compiled"] = shown(compiled(step))
print("JSON", json.dumps(found))
