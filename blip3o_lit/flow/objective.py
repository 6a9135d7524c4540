"""The flow-matching objective: what the network is trained to put out, and how it is read back.

Training and sampling share one class, so that every scale put on in the loss is taken off in the
estimate by construction. Everything here is in standardised tokens and float32.

Shapes: x_BND, z_BND, t_B; B batch, N tokens, D target width. A network is any callable
(x_BND, t_B, condition) -> out_BND.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.config.flow import FlowConfig
from blip3o_lit.flow.path import path_named

Network = Callable[[Tensor, Tensor, Any], Tensor]
Restore = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossTerms:
    """One step's loss and what is worth logging; all but `total` are detached."""

    total: Tensor
    """The number to differentiate."""
    mse: Tensor
    """Mean squared error of the output, in units of the unscaled target."""
    mse_B: Tensor
    """The same for each sample."""
    x1_hat_BND: Tensor
    """The estimate of x1, standardised."""
    norm_ratio: Tensor
    """Mean token norm of the output over that of its target; 1 when neither shrinks nor grows."""
    velocity_cosine: Tensor
    """Cosine of implied and true velocity, all tokens of a sample as one vector, mean over B."""
    cosine_loss: Tensor | None = None
    """1 - cosine between the restored estimate and the restored x1, where it is trained."""


class FlowObjective(nn.Module):
    """Loss, estimate of x1 and velocity of one flow configuration."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        self.path = path_named(config.path, config.sigma_min, config.sigma_max)

    def predict(self, network: Network, condition: Any, x_BND: Tensor, t_B: Tensor) -> Tensor:
        """Return the output in units of its unscaled target, float32.

        The only place where scales are applied: output_scale is part of the model, velocity_scale
        was on the training target and is divided out.
        """
        scale = self.config.output_scale / self.config.velocity_scale
        return network(x_BND, t_B, condition).float() * scale

    def estimate(
        self,
        network: Network,
        condition: Any,
        x_BND: Tensor,
        t_B: Tensor,
        check: bool = True,
    ) -> Tensor:
        """Return the estimate of x1 at (x_t, t): at t = 0 the posterior mean E[x1|c].

        Args:
            network: The network.
            condition: What it is conditioned on, encoded or not.
            x_BND: Points on the path.
            t_B: Their times.
            check: Refuse times without a value (waits for an accelerator); see Path.x1_from.

        Raises:
            UserError: If x1 has no value at one of the times.
        """
        out_BND = self.predict(network, condition, x_BND, t_B)
        return self.path.x1_from(self.config.prediction, out_BND, x_BND.float(), t_B, check)

    def velocity(
        self,
        network: Network,
        condition: Any,
        x_BND: Tensor,
        t_B: Tensor,
        check: bool = True,
    ) -> Tensor:
        """Return dx_t/dt at (x_t, t); arguments and errors as in `estimate`."""
        out_BND = self.predict(network, condition, x_BND, t_B)
        return self.path.velocity_from(self.config.prediction, out_BND, x_BND.float(), t_B, check)

    def loss(
        self,
        network: Network,
        condition: Any,
        x1_BND: Tensor,
        z_BND: Tensor,
        t_B: Tensor,
        restore: Restore | None = None,
    ) -> LossTerms:
        """Return the training loss of a batch.

        The squared error is taken between the scaled output and velocity_scale times the target,
        hence total = velocity_scale^2 mse + cosine_weight cosine_loss.

        Args:
            network: The network.
            condition: Its condition.
            x1_BND: Standardised target tokens.
            z_BND: Standard normal noise.
            t_B: Training times, inside the output's usable interval (times.py keeps them there).
            restore: Standardised tokens to raw tokens; None where they are the same.
        """
        config, path = self.config, self.path
        x1_BND, z_BND = x1_BND.float(), z_BND.float()
        x_BND = path.interpolate(x1_BND, z_BND, t_B)
        target_BND = path.output(config.prediction, x1_BND, z_BND, t_B)
        out_BND = self.predict(network, condition, x_BND, t_B)
        mse_B = (out_BND - target_BND).square().flatten(1).mean(1)
        mse = mse_B.mean()
        total = config.velocity_scale**2 * mse
        x1_hat_BND = path.x1_from(config.prediction, out_BND, x_BND, t_B, check=False)
        cosine_loss = None
        if config.cosine_weight > 0:
            restore = restore or nn.Identity()
            cosine_BN = F.cosine_similarity(restore(x1_hat_BND), restore(x1_BND), dim=-1)
            cosine_loss = 1 - cosine_BN.mean()
            total = total + config.cosine_weight * cosine_loss
        with torch.no_grad():
            velocity_BND = path.velocity(x1_BND, z_BND, t_B)
            implied_BND = path.velocity_from(config.prediction, out_BND, x_BND, t_B, check=False)
            cosine_B = F.cosine_similarity(implied_BND.flatten(1), velocity_BND.flatten(1))
            ratio = out_BND.norm(dim=-1).mean() / target_BND.norm(dim=-1).mean()
        return LossTerms(
            total=total,
            mse=mse.detach(),
            mse_B=mse_B.detach(),
            x1_hat_BND=x1_hat_BND.detach(),
            norm_ratio=ratio,
            velocity_cosine=cosine_B.mean(),
            cosine_loss=None if cosine_loss is None else cosine_loss.detach(),
        )
