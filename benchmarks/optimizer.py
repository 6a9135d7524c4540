"""An optimizer step with Muon, beside torch's own Muon and AdamW apart, and AdamW on everything."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon

from benchmarks.timing import interleaved, result
from benchmarks.training import SHAPE, model_config
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer, muon_matrices

SIZES = ("demo", "base")


def with_gradients(network: nn.Module) -> nn.Module:
    """Give every parameter a random gradient."""
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return network


def apart(network: nn.Module) -> Callable[[], None]:
    """Return a step of torch's two optimizers, Muon with the matrices that tokens go through."""
    hidden = list(muon_matrices(network, "tokens").values())
    own = {id(parameter) for parameter in hidden}
    rest = [p for p in network.parameters() if id(p) not in own]
    optimizers = (Muon(hidden, adjust_lr_fn="match_rms_adamw"), AdamW(rest, fused=True))
    return lambda: [optimizer.step() for optimizer in optimizers] and None


def run() -> list[dict[str, Any]]:
    """Time a step for two sizes."""
    found, config = [], OptimizerConfig("muon", muon_layers="tokens")
    for name in SIZES:
        network = build_network(model_config(name), SHAPE)
        nets = [with_gradients(copy.deepcopy(network)) for _ in range(3)]
        seconds = interleaved(
            {
                "muon": make_optimizer(nets[0], config).step,
                "torch's, apart": apart(nets[1]),
                "adamw": make_optimizer(nets[2], OptimizerConfig("adamw")).step,
            },
            rounds=5,
        )
        for case, value in seconds.items():
            print(f"  {name:<5} {case:<15} {1e3 * value:7.1f} ms a step")
        ratio = seconds["torch's, apart"] / seconds["muon"]
        found.append(result(f"optimizer/{name}_muon_over_torchs", ratio, "x", 1.0))
    return found
