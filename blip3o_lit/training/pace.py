"""How long a run's steps will take on this machine, from passes that are timed and thrown away."""

from __future__ import annotations

import copy
import time

import numpy as np
import torch

from blip3o_lit.budget.plan import Plan
from blip3o_lit.extraction.direct.store import PictureReader
from blip3o_lit.flow.pairs import UNIFORMS, pair_times
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.training.module import TranslationModule

IMAGES, PASSES, SECONDS = 8, 6, 3.0
"""Images of a pass and passes, at most, and seconds after which no third one begins."""


def step_seconds(plan: Plan, module: TranslationModule, train: TokenReader) -> float:
    """Return the seconds of one optimizer step's passes, forward and backward, on a CPU.

    Where a run encodes pictures itself, that is in it. The best pass on the first images counts:
    the first ones pay for memory and kernels. Weights, random state and the flow's adapted scales
    stay as they are.
    """
    place = plan.placement
    count = min(IMAGES, place.micro_batch, len(train))
    started = time.perf_counter()
    batch = train.read(np.arange(count))
    encoding = time.perf_counter() - started if isinstance(train, PictureReader) else 0.0
    condition = module.standardised(batch["condition"])
    x1_BND = module.target_standardizer.standardise(batch["target"])
    objective, best = copy.deepcopy(module.objective), float("inf")
    end = time.perf_counter() + SECONDS
    with torch.random.fork_rng(devices=[]):
        z_BND, (t_B, pairs) = torch.randn_like(x1_BND), (torch.rand(count), None)
        if objective.config.pairs > 0:
            evenly_BU = ((torch.arange(count) + 0.5) / count)[:, None].expand(-1, UNIFORMS)
            t_B, pairs = pair_times(evenly_BU, t_B, objective.config)
        for number in range(PASSES):
            start = time.perf_counter()
            if number > 1 and start > end:
                break
            autocast = place.precision.autocast
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                terms = objective.loss(module.network, condition, x1_BND, z_BND, t_B, pairs=pairs)
            terms.total.backward()
            best = min(best, time.perf_counter() - start)
    module.network.zero_grad(set_to_none=True)
    return (best + encoding) * place.accumulation * place.micro_batch / count
