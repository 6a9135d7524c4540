"""The optimizer of a network: AdamW, or Muon on the matrices of its blocks and AdamW on the rest.

Muon's steps have the size of AdamW's, so one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.muon import muon_step


def make_optimizer(network: nn.Module, config: OptimizerConfig, fused: bool = True) -> AdamW:
    """Build the optimizer of all parameters; weight decay is on the weights of linear layers alone.

    Args:
        network: The network; Muon's matrices are those of the linear layers of `network.blocks`.
        config: Names the optimizer and its settings.
        fused: Use the fused kernel of AdamW, which leaves everything as it was where its attribute
            `found_inf` is 1.
    """
    linear = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Linear)}
    hidden, matrices, rest = [], [], []
    for name, parameter in network.named_parameters():
        if id(parameter) not in linear:
            rest.append(parameter)
        elif config.name == "muon" and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "fused": fused}
    if config.name == "adamw":
        return AdamW(groups, lr=config.peak, **options)
    muon = {"params": hidden, "weight_decay": config.weight_decay, "momentum": config.momentum}
    return MuonAdamW([*groups, muon], lr=config.peak, **options)


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
