"""Norms: root mean square (Zhang and Sennrich, 2019), layer, adaptive, and rotated for attention.

Shape suffixes: B batch, N tokens, H heads, K head width, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """Return x / rms(x) over the last axis, in the dtype of x.

    Autocast would run the norm in fp32 and pass fp32 on to all that follows; the kernel sums in
    fp32 by itself.
    """
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], None, eps)


def rotate(x_BNHK: Tensor, rope: Tensor | None) -> Tensor:
    """Rotate by a table of `layers.rope_table`, [2, N, 1, K]; None leaves x as it is.

    x cosine + (x with its halves swapped) signed sine.
    """
    if rope is None:
        return x_BNHK
    cosine, signed_sine = rope.to(x_BNHK.dtype)
    half = x_BNHK.shape[-1] // 2
    return torch.addcmul(x_BNHK * cosine, x_BNHK.roll(half, -1), signed_sine)


def rotated_rms_norm(x_BNHK: Tensor, weight: Tensor, rope: Tensor | None, eps: float) -> Tensor:
    """Normalise heads, multiply by a weight, [K] or per head [H, K], and rotate."""
    return rotate(rms_norm(x_BNHK, eps) * weight.to(x_BNHK.dtype), rope)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps) * self.weight.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm that keeps the input's dtype, under autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


def norm_layer(kind: str, width: int) -> nn.Module:
    return RMSNorm(width) if kind == "rms" else LayerNorm(width)


def modulate(
    x_BNW: Tensor, shift_B1W: Tensor, scale_B1W: Tensor, kind: str = "rms", eps: float = 1e-6
) -> Tensor:
    """Adaptive norm of the AdaLN-Zero block: normalise, multiply by 1 + scale, add shift."""
    if kind == "rms":
        normed = rms_norm(x_BNW, eps)
    else:
        normed = F.layer_norm(x_BNW, x_BNW.shape[-1:], eps=eps).to(x_BNW.dtype)
    return torch.addcmul(shift_B1W, normed, 1 + scale_B1W)
