"""Averages of the weights whose width is chosen after training.

A power-function average at step t weighs the weights of step i by (i / t)^(g + 1) - ((i - 1) /
t)^(g + 1): the integral over one step of the profile (g + 1) tau^g / t^(g + 1). Its width is the
profile's standard deviation over t. Stored averages of two widths span, to a small error, those of
the widths around them; the coefficients are the least squares over the profiles, among those that
add up to one: weights that don't change are kept as they are.

Source: Karras et al. 2024, arXiv:2312.02696, section 3 and appendix C.

Shape suffixes: K stored averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Fit:
    """An average as a sum over stored ones."""

    coefficients_K: np.ndarray
    missed: float
    """What the sum misses of the profile: the norm of the difference over that of the profile."""


@lru_cache
def exponent(width: float) -> float:
    """Return g of a width: (g + 1) / (g + 2)^2 / (g + 3) = width^2.

    A width lies above 0 and up to 12^-0.5, that of the plain mean of all steps (g = 0).
    """
    square = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - square, 12.0 - square])
    return float(max(roots.real))


def decay(width: float, step: int) -> float:
    """Return the decay with which step `step`, from 1 on, enters the running average."""
    return (1.0 - 1.0 / step) ** (exponent(width) + 1.0)


def fit(widths: Sequence[float], steps: Sequence[int], width: float, step: int) -> Fit:
    """Return the sum over averages, of `widths` at `steps`, that is nearest to another one.

    None of `steps` lies after `step`.
    """
    own = np.array([exponent(one) for one in widths]), np.array(steps, dtype=np.float64)
    wanted = np.array([exponent(width)]), np.array([step], dtype=np.float64)
    products_KK = _products(own, own)
    target_K = _products(own, wanted)[:, 0]
    count = len(target_K)
    system = np.ones((count + 1, count + 1))  # with Lagrange's multiplier of the sum
    system[:count, :count], system[count, count] = products_KK, 0.0
    coefficients_K = np.linalg.lstsq(system, np.append(target_K, 1.0), rcond=1e-13)[0][:count]
    whole = _products(wanted, wanted)[0, 0]
    square = whole - 2 * coefficients_K @ target_K + coefficients_K @ products_KK @ coefficients_K
    return Fit(coefficients_K, float(np.sqrt(max(0.0, square) / whole)))


def _products(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Return the inner products of profiles, each given by its exponent and step."""
    g, t, h, u = a[0][:, None], a[1][:, None], b[0][None], b[1][None]
    end = np.minimum(t, u)
    scale = (g + 1) * (h + 1) / (g + h + 1) * end / (t * u)
    return scale * (end / t) ** g * (end / u) ** h
