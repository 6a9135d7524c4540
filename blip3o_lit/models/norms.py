"""Norms: root mean square (Zhang and Sennrich, 2019), layer and adaptive; the rotary embedding.

Shape suffixes: B batch, N tokens, H heads, K head width, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float, weight_W: Tensor | None = None) -> Tensor:
    """Return x / rms(x) over the last axis, times a weight, in the dtype of x.

    Autocast would run the norm in fp32 and pass fp32 on to all that follows; the kernel sums in
    fp32 by itself.
    """
    weight_W = None if weight_W is None else weight_W.to(x.dtype)
    with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
        return F.rms_norm(x, x.shape[-1:], weight_W, eps)


def rotate(x_BNHK: Tensor, rope: Tensor | None) -> Tensor:
    """Rotate by a table of `layers.rope_table`, [2, N, 1, K]; None leaves x as it is.

    x cosine + (x with its halves swapped) signed sine.
    """
    if rope is None:
        return x_BNHK
    cosine, signed_sine = rope.to(x_BNHK.dtype)
    half = x_BNHK.shape[-1] // 2
    return (x_BNHK * cosine).addcmul_(x_BNHK.roll(half, -1), signed_sine)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps, self.weight)


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
