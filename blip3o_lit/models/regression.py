"""Baselines trained by gradient descent: condition -> target by squared error, without a flow.

As the closed forms of `baselines.py` they work in standardised space. The transformer has the
cosine term of the run's own loss as well: it differs from the flow in nothing but the noise.

Shape suffixes: B images, N target tokens, D target width, M condition tokens, C condition width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.condition import AnyCondition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.optimizer import OptimizerConfig
from blip3o_lit.models.baselines import Batches, condition_at_targets
from blip3o_lit.models.network_of import build_network
from blip3o_lit.models.optimizer import make_optimizer

Restore = Callable[[Tensor], Tensor]
Progress = Callable[[int, Tensor], None]
"""Called after each training step with the steps done and the loss (a tensor: no forced sync)."""


class Regressor(nn.Module):
    """A module from a condition to target tokens [B, N, D], and its training."""

    def fit(
        self,
        batches: Batches,
        steps: int,
        config: OptimizerConfig | None = None,
        bf16: bool = True,
        progress: Progress | None = None,
        cosine_weight: float = 0.0,
        restore: Restore | None = None,
    ) -> None:
        """Train by mean squared error, in place, on the module's device.

        Warm-up over a twentieth of the steps, cosine decay to a hundredth, gradients clipped to
        norm 1; passes over the data follow one another.

        Args:
            batches: The training split.
            steps: Optimizer steps.
            config: The optimizer, with the peak learning rate; None: the default one.
            bf16: Run the network under bf16 autocast; the loss is fp32.
            progress: Told of each step.
            cosine_weight: Weight of 1 - cosine of the restored tokens beside the squared error.
            restore: Standardised tokens to raw ones; None where they are the same.
        """
        restore = restore or nn.Identity()
        device = next(self.parameters()).device
        optimizer = make_optimizer(self.optimised(), config or OptimizerConfig())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        self.train()
        for step, (condition, target_BND) in zip(range(1, steps + 1), _forever(batches)):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                guess_BND = self(condition.to(device).float())
            guess_BND, target_BND = guess_BND.float(), target_BND.to(device, torch.float32)
            loss = F.mse_loss(guess_BND, target_BND)
            if cosine_weight > 0:
                cosine_BN = F.cosine_similarity(restore(guess_BND), restore(target_BND), dim=-1)
                loss = loss + cosine_weight * (1 - cosine_BN.mean())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if progress is not None:
                progress(step, loss.detach())
        self.eval()

    def optimised(self) -> nn.Module:
        """Return the module that is optimised: Muon tells its layers by their names."""
        return self

    @torch.no_grad()
    def predict(self, condition: AnyCondition) -> Tensor:
        """Predict the target tokens, [B, N, D] fp32."""
        return self(condition.to(next(self.parameters()).device).float()).float()


class PatchMLP(Regressor):
    """Two-layer network on the condition token at each position, with a bias per position."""

    def __init__(self, shape: PairShape, hidden: int = 1024) -> None:
        super().__init__()
        self.shape = shape
        self.first = nn.Linear(shape.grid.width, hidden)
        self.position = nn.Parameter(torch.zeros(shape.target.tokens, hidden))
        self.second = nn.Linear(hidden, shape.target.width)

    def forward(self, condition_BMC: Tensor) -> Tensor:
        x_BNC = condition_at_targets(condition_BMC, self.shape)
        return self.second(F.gelu(self.first(x_BNC) + self.position))


class Regression(Regressor):
    """The same transformer trained without noise (x_t = 0, t = 0) to output the target."""

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        super().__init__()
        self.shape = shape
        self.network = build_network(config, shape)

    def optimised(self) -> nn.Module:
        return self.network

    def forward(self, condition: AnyCondition) -> Tensor:
        batch, target = len(condition), self.shape.target
        x_BND = torch.zeros(batch, target.tokens, target.width, device=condition.device)
        return self.network(x_BND, x_BND.new_zeros(batch), condition)


def _rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a rising line, then a half cosine down to 0.01."""
    warm_up = max(1, steps // 20)
    decay = 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / max(1, steps)))
    return min(1.0, (step + 1) / warm_up) * (0.01 + 0.99 * decay)


def _forever(batches: Batches) -> Iterator[tuple[AnyCondition, Tensor]]:
    while True:
        empty = True
        for batch in batches():
            empty = False
            yield batch
        if empty:
            raise UserError("baselines: the training split has no batch; add data")
