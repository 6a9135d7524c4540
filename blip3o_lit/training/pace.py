"""How long a run's steps will take on this machine, from passes that are timed and thrown away."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch

from blip3o_lit.budget.plan import Plan
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.training.module import TranslationModule


def step_seconds(plan: Plan, module: TranslationModule, data: TokenDataModule) -> float:
    """Return the seconds of one optimizer step's passes, forward and backward, on a CPU.

    The second of two is timed, on the first images. Weights, random state and the flow's adapted
    scales stay as they are.
    """
    place = plan.placement
    count = min(place.micro_batch, len(data.train))
    batch = data.train.read(np.arange(count))
    condition = module.condition_standardizer.standardise(batch["condition"])
    x1_BND = module.target_standardizer.standardise(batch["target"])
    objective, seconds = copy.deepcopy(module.objective), 0.0
    with torch.random.fork_rng(devices=[]):
        z_BND, t_B = torch.randn_like(x1_BND), torch.rand(count)
        for _ in range(2):
            start = time.perf_counter()
            autocast = place.precision.autocast
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                terms = objective.loss(module.network, condition, x1_BND, z_BND, t_B)
            terms.total.backward()
            seconds = time.perf_counter() - start
    module.network.zero_grad(set_to_none=True)
    return seconds * place.accumulation * place.micro_batch / count
