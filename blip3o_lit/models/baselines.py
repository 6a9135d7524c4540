"""Closed-form baselines: what a score must beat before it means anything.

All work in standardised space, are fitted on the training split alone, and keep what they learned
in their state dict. Where grids differ the condition is resampled to the target's grid.

Shape suffixes: B images, N target tokens, D target width, M condition tokens, C condition width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.condition import AnyCondition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError

Batches = Callable[[], Iterable[tuple[AnyCondition, Tensor]]]
"""Each call starts one pass over the training split: standardised (condition, target) batches."""


def condition_at_targets(condition_BMC: Tensor, shape: PairShape) -> Tensor:
    """Return one condition token per target token, [B, N, C].

    Unequal grids are resampled bilinearly; a target CLS without a condition CLS gets the mean.

    Raises:
        UserError: If the condition has words.
    """
    source, target = shape.grid, shape.target
    patches = condition_BMC[:, int(source.cls) :]
    if source.grid != target.grid:
        image = patches.transpose(1, 2).unflatten(2, source.grid)
        image = F.interpolate(image, target.grid, mode="bilinear", antialias=True)
        patches = image.flatten(2).transpose(1, 2)
    if not target.cls:
        return patches
    cls = condition_BMC[:, :1] if source.cls else condition_BMC.mean(1, keepdim=True)
    return torch.cat((cls, patches), 1)


class MeanToken(nn.Module):
    """The training split's mean token at each position, whatever the condition."""

    mean: Tensor

    def __init__(self, shape: PairShape) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape.target.tokens, shape.target.width))

    @torch.no_grad()
    def fit(self, batches: Batches) -> None:
        """Average the targets of one pass in fp64."""
        total, images = torch.zeros_like(self.mean, dtype=torch.float64), 0
        for _, target_BND in batches():
            total += target_BND.to(total).sum(0)
            images += len(target_BND)
        self.mean.copy_(total / images)

    def predict(self, condition: AnyCondition) -> Tensor:
        return self.mean.expand(len(condition), -1, -1)


class _Moments:
    """Running fp64 sums of the products of inputs x [B, T, C] and outputs y [B, T, D]."""

    def __init__(self, tokens: int, inputs: int, outputs: int, device: torch.device) -> None:
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.images = 0
        self.x_TC, self.y_TD = zeros(tokens, inputs), zeros(tokens, outputs)
        self.xx, self.xy, self.yy = zeros(inputs, inputs), zeros(inputs, outputs), zeros(())

    def add(self, x_BTC: Tensor, y_BTD: Tensor) -> None:
        self.images += len(x_BTC)
        self.x_TC += x_BTC.sum(0)
        self.y_TD += y_BTD.sum(0)
        x, y = x_BTC.flatten(0, 1), y_BTD.flatten(0, 1)
        self.xx.addmm_(x.T, x)
        self.xy.addmm_(x.T, y)
        self.yy += y.square().sum()

    def merge(self, other: _Moments) -> None:
        self.images += other.images
        for key in ("x_TC", "y_TD", "xx", "xy", "yy"):
            getattr(self, key).add_(getattr(other, key))

    @property
    def noise(self) -> float:
        """Return a bound on what rounding leaves of `about`'s xx where inputs do not vary."""
        return 1e-12 * float(self.xx.diagonal().sum()) + 1e-12

    def about(self, x_TC: Tensor, y_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sums of products of deviations from two position means."""
        n = self.images
        cross = x_TC.T @ self.x_TC
        xx = self.xx - cross - cross.T + n * x_TC.T @ x_TC
        xy = self.xy - x_TC.T @ self.y_TD - self.x_TC.T @ y_TD + n * x_TC.T @ y_TD
        yy = self.yy - 2 * (y_TD * self.y_TD).sum() + n * y_TD.square().sum()
        return xx, xy, yy

    def means(self) -> tuple[Tensor, Tensor]:
        return self.x_TC / self.images, self.y_TD / self.images


class Ridge(nn.Module):
    """Ridge regression from the condition token at a position to the target token there.

    The weights are shared over patch positions (CLS has its own), the unpenalised bias is per
    position, so MeanToken is the limit of a large penalty. Exact: fp64 normal equations,
    streamed. The penalty, as a share of the mean input variance, is the best of `penalties` on
    every eighth image of the training split; then all images are fitted.
    """

    weight: Tensor
    bias: Tensor
    penalty: Tensor

    penalties = tuple(10.0**power for power in range(-6, 3))

    def __init__(self, shape: PairShape) -> None:
        super().__init__()
        self.shape = shape
        target, inputs = shape.target, shape.grid.width
        self.parts = [slice(0, 1), slice(1, None)] if target.cls else [slice(None)]  # CLS, patches
        self.register_buffer("weight", torch.zeros(len(self.parts), inputs, target.width))
        self.register_buffer("bias", torch.zeros(target.tokens, target.width))
        self.register_buffer("penalty", torch.zeros(len(self.parts)))

    @torch.no_grad()
    def fit(self, batches: Batches) -> None:
        """Fit in one pass.

        Raises:
            UserError: If the training split has fewer than 2 images.
        """
        fitted, held = self._moments(), self._moments()
        seen = 0
        for condition_BMC, target_BND in batches():
            assert isinstance(condition_BMC, Tensor)
            x = condition_at_targets(condition_BMC.to(self.bias), self.shape).double()
            y = target_BND.to(x)
            rest = torch.arange(seen, seen + len(x), device=x.device) % 8 != 0
            seen += len(x)
            for index, part in enumerate(self.parts):
                fitted[index].add(x[rest, part], y[rest, part])
                held[index].add(x[~rest, part], y[~rest, part])
        if seen < 2:
            raise UserError(
                f"baselines: ridge needs 2 training images, got {seen}: add data, or set "
                "baselines=none"
            )
        for index, part in enumerate(self.parts):
            self._solve(index, part, fitted[index], held[index])

    def _moments(self) -> list[_Moments]:
        _, inputs, outputs = self.weight.shape
        sizes = [len(self.bias[part]) for part in self.parts]
        return [_Moments(size, inputs, outputs, self.bias.device) for size in sizes]

    def _solve(self, index: int, part: slice, fitted: _Moments, held: _Moments) -> None:
        """Choose the penalty of one part on `held`, then fit both together."""
        means = fitted.means()
        xx, xy, _ = fitted.about(*means)
        held_xx, held_xy, held_yy = held.about(*means)
        errors = []
        for penalty in self.penalties:
            weight = _ridge(xx, xy, penalty, fitted.noise)
            explained = 2 * (weight * held_xy).sum() - (weight * (held_xx @ weight)).sum()
            errors.append(held_yy - explained)
        best = self.penalties[int(torch.stack(errors).argmin())]
        fitted.merge(held)
        x_TC, y_TD = fitted.means()
        xx, xy, _ = fitted.about(x_TC, y_TD)
        weight = _ridge(xx, xy, best, fitted.noise)
        self.weight[index], self.bias[part] = weight.float(), (y_TD - x_TC @ weight).float()
        self.penalty[index] = best

    def predict(self, condition_BMC: AnyCondition) -> Tensor:
        assert isinstance(condition_BMC, Tensor)
        x_BNC = condition_at_targets(condition_BMC.to(self.bias), self.shape)
        parts = [x_BNC[:, part] @ self.weight[index] for index, part in enumerate(self.parts)]
        return torch.cat(parts, 1) + self.bias


def _ridge(xx: Tensor, xy: Tensor, penalty: float, noise: float) -> Tensor:
    """Solve (xx + shift I) w = xy by Cholesky; the shift is a share of the mean diagonal.

    It is no smaller than `noise`, so that inputs that are all alike get weights of about zero.
    """
    shift = (penalty * xx.diagonal().mean()).clamp_min(noise)
    factor = torch.linalg.cholesky(xx + shift * torch.eye(len(xx)).to(xx))
    return torch.cholesky_solve(xy, factor)
