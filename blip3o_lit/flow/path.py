"""Gaussian probability paths x_t = alpha(t) x1 + sigma(t) z and the exact conversions on them.

t = 0 is noise and t = 1 is data. Every path gives its two coefficients and their derivatives, so
that the velocity of a pair is alpha' x1 + sigma' z and any of velocity, sample (x1) and noise (z)
follows from any other and (x_t, t). Where a conversion divides by zero the answer does not exist:
it is refused with the reason and never clamped.

Shapes: x_BND, any leading batch; t_B. B batch, N tokens, D target width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blip3o_lit.config import registry as register
from blip3o_lit.config.errors import UserError

Curve = Callable[[Tensor], Tensor]


def over(t_B: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per sample so that it broadcasts over the other axes of `x`."""
    return t_B.reshape(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Path:
    """One Gaussian path: its coefficients, their exact derivatives, and the conversions.

    All arithmetic is in the precision of the arguments; give float32 or wider.
    """

    name: str
    alpha: Curve
    """Coefficient of the data."""
    sigma: Curve
    """Coefficient of the noise."""
    d_alpha: Curve
    d_sigma: Curve

    def interpolate(self, x1_BND: Tensor, z_BND: Tensor, t_B: Tensor) -> Tensor:
        """Return x_t = alpha x1 + sigma z."""
        t = over(t_B, x1_BND)
        return torch.addcmul(self.alpha(t) * x1_BND, self.sigma(t), z_BND)

    def velocity(self, x1_BND: Tensor, z_BND: Tensor, t_B: Tensor) -> Tensor:
        """Return dx_t/dt = alpha' x1 + sigma' z."""
        t = over(t_B, x1_BND)
        return torch.addcmul(self.d_alpha(t) * x1_BND, self.d_sigma(t), z_BND)

    def output(self, prediction: str, x1_BND: Tensor, z_BND: Tensor, t_B: Tensor) -> Tensor:
        """Return what a network with this `prediction` is trained to put out for a pair."""
        if prediction == "velocity":
            return self.velocity(x1_BND, z_BND, t_B)
        return x1_BND if prediction == "sample" else z_BND

    def x1_from(
        self, prediction: str, out_BND: Tensor, x_BND: Tensor, t_B: Tensor, check: bool = True
    ) -> Tensor:
        """Return the data x1 that the output implies.

        Args:
            prediction: velocity, sample or noise: what `out_BND` is.
            out_BND: The output.
            x_BND: The point x_t at which it was given.
            t_B: Its time.
            check: Look for times without an answer, which waits for an accelerator; False where
                the times are known to lie inside the usable interval.

        Raises:
            UserError: If x1 has no value at one of the times.
        """
        if check:
            self._check(prediction, "sample", t_B)
        t = over(t_B, x_BND)
        if prediction == "velocity":
            return (self.sigma(t) * out_BND - self.d_sigma(t) * x_BND) / self._wronskian(t)
        if prediction == "noise":
            return (x_BND - self.sigma(t) * out_BND) / self.alpha(t)
        return out_BND

    def velocity_from(
        self, prediction: str, out_BND: Tensor, x_BND: Tensor, t_B: Tensor, check: bool = True
    ) -> Tensor:
        """Return the velocity that the output implies; arguments and errors as in `x1_from`."""
        if check:
            self._check(prediction, "velocity", t_B)
        if prediction == "velocity":
            return out_BND
        t = over(t_B, x_BND)
        if prediction == "sample":
            noise_BND = (x_BND - self.alpha(t) * out_BND) / self.sigma(t)
            return self.d_alpha(t) * out_BND + self.d_sigma(t) * noise_BND
        x1_BND = (x_BND - self.sigma(t) * out_BND) / self.alpha(t)
        return self.d_alpha(t) * x1_BND + self.d_sigma(t) * out_BND

    def step(self, x_BND: Tensor, x1_BND: Tensor, t_B: Tensor, s_B: Tensor) -> Tensor:
        """Return x_s from x_t where the estimate of x1 stays the same between t and s.

        x / sigma moves by the estimate alone, so that this is exact in the noise. sigma(t) > 0.
        """
        t, s = over(t_B, x_BND), over(s_B, x_BND)
        shrink = self.sigma(s) / self.sigma(t)
        return torch.addcmul(shrink * x_BND, self.alpha(s) - self.alpha(t) * shrink, x1_BND)

    def gain(self, prediction: str, wanted: str, t_B: Tensor) -> Tensor:
        """Return by how much an error of the output is enlarged in `wanted` (velocity or sample).

        It is the absolute derivative of the conversion; infinite where that has no value.
        """
        if prediction == wanted:
            return torch.ones_like(t_B)
        alpha, sigma, wronskian = self.alpha(t_B), self.sigma(t_B), self._wronskian(t_B)
        if wanted == "velocity":
            return (wronskian / (sigma if prediction == "sample" else alpha)).abs()
        return (sigma / (wronskian if prediction == "velocity" else alpha)).abs()

    def has_value(self, prediction: str, wanted: str, t_B: Tensor) -> Tensor:
        """Tell for each time whether `wanted` (velocity or sample) follows from (x_t, output)."""
        return self.gain(prediction, wanted, t_B).isfinite()

    def _wronskian(self, t: Tensor) -> Tensor:
        """Return alpha' sigma - alpha sigma', zero where a velocity does not determine x1."""
        return self.d_alpha(t) * self.sigma(t) - self.alpha(t) * self.d_sigma(t)

    def _check(self, prediction: str, wanted: str, t_B: Tensor) -> None:
        if bool(self.has_value(prediction, wanted, t_B).all()):
            return
        if prediction == "sample":
            why, fix = "at sigma = 0 (t = 1)", "flow.sigma_min above 0 or a time below 1"
        elif prediction == "noise":
            why, fix = "at alpha = 0 (t = 0)", "flow.prediction=sample or a time above 0"
        else:
            why, fix = "where alpha' = 0 (t = 0)", "flow.prediction=sample or a time above 0"
        name = "x1" if wanted == "sample" else wanted
        raise UserError(
            f"flow.path={self.name} flow.prediction={prediction}: {name} has no value {why}: "
            f"use {fix}"
        )


def _linear(sigma_min: float, sigma_max: float) -> Path:
    """Lipman et al. 2022 (arXiv:2210.02747): alpha = t, sigma = 1 - (1 - sigma_min) t."""
    slope = sigma_min - 1.0
    return Path(
        "linear",
        alpha=lambda t: t,
        sigma=lambda t: (1 - t) + sigma_min * t,
        d_alpha=torch.ones_like,
        d_sigma=lambda t: torch.full_like(t, slope),
    )


def _trigonometric(sigma_min: float, sigma_max: float) -> Path:
    """Albergo and Vanden-Eijnden 2022 (arXiv:2209.15571): sin(pi t/2), cos(pi t/2).

    The cosine is written as a sine of 1 - t, so that it is exactly 0 at t = 1.
    """
    half = math.pi / 2
    return Path(
        "trigonometric",
        alpha=lambda t: torch.sin(half * t),
        sigma=lambda t: torch.sin(half * (1 - t)),
        d_alpha=lambda t: half * torch.sin(half * (1 - t)),
        d_sigma=lambda t: -half * torch.sin(half * t),
    )


def _with_extra_noise(
    name: str, alpha: Curve, d_alpha: Curve, rest: Curve, extra: Curve, d_extra: Curve
) -> Path:
    """Build the path (1 - alpha) z0 + alpha x1 + extra z', its two Gaussians folded into one.

    sigma = sqrt(rest^2 + extra^2), rest = 1 - alpha; sigma' = (rest rest' + extra extra') / sigma,
    with the limit -sqrt(rest'^2 + extra'^2) where both reach zero together.
    """

    def sigma(t: Tensor) -> Tensor:
        return torch.hypot(rest(t), extra(t))

    def d_sigma(t: Tensor) -> Tensor:
        level, d_rest = sigma(t), -d_alpha(t)
        slope = (rest(t) * d_rest + extra(t) * d_extra(t)) / level
        return torch.where(level > 0, slope, -torch.hypot(d_rest, d_extra(t)))

    return Path(name, alpha, sigma, d_alpha, d_sigma)


def _seed_linear(sigma_min: float, sigma_max: float) -> Path:
    """Alpha = t with extra noise sigma_min + (sigma_max - sigma_min)(1 - t)."""
    span = sigma_max - sigma_min
    return _with_extra_noise(
        "seed_linear",
        alpha=lambda t: t,
        d_alpha=torch.ones_like,
        rest=lambda t: 1 - t,
        extra=lambda t: sigma_min + span * (1 - t),
        d_extra=lambda t: torch.full_like(t, -span),
    )


def _seed_cosine(sigma_min: float, sigma_max: float) -> Path:
    """Alpha = (1 - cos pi t)/2 with extra noise sigma_min + (sigma_max - sigma_min) cos(pi t/2)."""
    half, span = math.pi / 2, sigma_max - sigma_min
    return _with_extra_noise(
        "seed_cosine",
        alpha=lambda t: torch.sin(half * t).square(),
        d_alpha=lambda t: math.pi * torch.sin(half * t) * torch.sin(half * (1 - t)),
        rest=lambda t: torch.sin(half * (1 - t)).square(),
        extra=lambda t: sigma_min + span * torch.sin(half * (1 - t)),
        d_extra=lambda t: -half * span * torch.sin(half * t),
    )


_BUILDERS: dict[str, Callable[[float, float], Path]] = {
    "linear": _linear,
    "trigonometric": _trigonometric,
    "seed_linear": _seed_linear,
    "seed_cosine": _seed_cosine,
}


def path_named(name: str, sigma_min: float = 0.0, sigma_max: float = 1.0) -> Path:
    """Return a path by its option name, one of `config.flow.PATHS` or registered.

    Args:
        name: The name.
        sigma_min: Noise left at t = 1 (linear and the seeds' paths).
        sigma_max: Extra noise at t = 0 (the seeds' paths).

    Raises:
        UserError: If no path has this name.
    """
    if name in _BUILDERS:
        return _BUILDERS[name](sigma_min, sigma_max)
    made = register.path.build(name, sigma_min, sigma_max)
    return replace(made, name=name)
