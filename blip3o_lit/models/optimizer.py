"""The optimizer of a network: AdamW, or Muon on its matrices and AdamW on the rest.

Muon's steps have the size of AdamW's, so one learning rate serves both. A language model's first
and last matrix are tables of words, which Muon is not for; here they are maps of dense tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.muon import muon_step

OF_TIME = ("time.", "span.", "modulation.")
"""Begin the names of layers that see the time and no token."""


def make_optimizer(network: nn.Module, config: OptimizerConfig, fused: bool = True) -> AdamW:
    """Build the optimizer of all parameters; weight decay is on the weights of linear layers alone.

    Args:
        network: The network.
        config: Names the optimizer and its settings.
        fused: Use the fused kernel of AdamW, which leaves everything as it was where its attribute
            `found_inf` is 1.
    """
    linear = linear_weights(network)
    muons = muon_matrices(network, config.muon_layers) if config.name == "muon" else {}
    matrices = [weight for name, weight in linear.items() if name not in muons]
    rest = [p for name, p in network.named_parameters() if name not in linear]
    decay = config.weight_decay
    groups = [
        {"params": matrices, "weight_decay": decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "fused": fused}
    if config.name == "adamw":
        return AdamW(groups, lr=config.peak, **options)
    muon = {"params": list(muons.values()), "weight_decay": decay, "momentum": config.momentum}
    return MuonAdamW([*groups, muon], lr=config.peak, **options)


def linear_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights of the linear layers by name."""
    layers = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Linear)}
    return {name: p for name, p in network.named_parameters() if id(p) in layers}


def muon_matrices(network: nn.Module, layers: str) -> dict[str, nn.Parameter]:
    """Return by name the matrices that Muon steps with that optimizer.muon_layers."""
    weights = linear_weights(network).items()
    if layers == "blocks":
        return {name: weight for name, weight in weights if name.startswith("blocks.")}
    return {name: weight for name, weight in weights if not name.startswith(OF_TIME)}


class MuonAdamW(AdamW):
    """AdamW whose last group of parameters takes Muon's steps.

    One optimizer to Lightning, to schedules and in checkpoints: one list of groups, one state.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = groups[:-1]
            super().step()
        finally:
            self.param_groups = groups
        muon_step(groups[-1], self.state, getattr(self, "found_inf", None))
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own way looks for its step counter in Muon's state.
        Optimizer.__setstate__(self, state)
