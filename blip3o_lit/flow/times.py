"""Training times: from two uniform numbers per sample to t in [0, 1).

The distribution, then the noise-level shift, then a share of the batch at exactly t = 0, where one
evaluation is the posterior mean. Shapes: B batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blip3o_lit.config.flow import FlowConfig

# Smallest distance from 0 and 1: 2^-24, so that float32 holds 1 - EDGE and no draw is singular.
EDGE = 2.0**-24


def shifted(t: Tensor, shift: float) -> Tensor:
    """Shift the noise level 1 - t: sigma' = s sigma / (1 + (s - 1) sigma).

    Esser et al. 2024 (arXiv:2403.03206), section 5.3.2; s above 1 moves times towards noise.
    """
    sigma = 1 - t
    return 1 - shift * sigma / (1 + (shift - 1) * sigma)


def training_times(uniforms_B2: Tensor, config: FlowConfig) -> Tensor:
    """Turn uniform numbers into training times by the flow configuration.

    uniform: t = u; logit_normal: t = sigmoid(mean + std Phi^-1(u)); u_shaped: t = sin^2(pi u/2),
    which is Beta(1/2, 1/2). All are inverse distribution functions, so equal numbers give equal
    times on every device.

    Args:
        uniforms_B2: Uniform on (0, 1): column 0 draws the time, column 1 the share at t = 0.
        config: The flow group.

    Returns:
        float32 times [B]; but for the share at t = 0 strictly between 0 and 1.
    """
    t = distributed(uniforms_B2[:, 0], config)
    return torch.where(uniforms_B2[:, 1] < config.time_zero_share, 0.0, t).float()


def distributed(uniforms_B: Tensor, config: FlowConfig) -> Tensor:
    """Return float64 times of the configured distribution, strictly between 0 and 1."""
    u = uniforms_B.double()
    if config.time == "logit_normal":
        t = torch.sigmoid(config.time_mean + config.time_std * torch.special.ndtri(u))
    elif config.time == "u_shaped":
        t = torch.sin(math.pi / 2 * u).square()
    else:
        t = u
    return shifted(t, config.time_shift).clamp(EDGE, 1 - EDGE)
