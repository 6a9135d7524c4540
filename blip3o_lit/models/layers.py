"""Building blocks of the transformers: rotary embedding, attention, feed-forward, adapter, time.

Shape suffixes: B batch, N target tokens, M condition tokens, W network width, H query heads,
C condition width, G key and value heads, K head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.models.norms import RMSNorm, rotate


def rope_table(
    shape: TokenShape, head_width: int, extent: tuple[int, int] | None = None, base: float = 100.0
) -> Tensor:
    """Tables of the 2-D rotary embedding: cosines and signed sines, [2, N, 1, K], fp32.

    Channel i is paired with channel i + K/2. Of the K/2 pairs the first half rotates with the row
    and the second half with the column, at frequencies base^(-j / (K/4)); base 100 suits grids of
    tens of patches. The CLS token, if any, gets the identity.

    Args:
        shape: The grid, with or without CLS.
        head_width: K, a multiple of 4.
        extent: Size of another grid that this one is laid over, cell centres kept; None: its own.
        base: Ratio between the fastest and (nearly) the slowest frequency.
    """
    extent = extent or shape.grid
    quarter = head_width // 4
    frequency = base ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = (
        (torch.arange(cells, dtype=torch.float32) + 0.5) * (span / cells) - 0.5
        for cells, span in zip(shape.grid, extent)
    )
    by_row = torch.outer(rows, frequency).repeat_interleave(len(columns), 0)
    by_column = torch.outer(columns, frequency).repeat(len(rows), 1)
    angle = torch.cat((by_row, by_column), -1)
    if shape.cls:
        angle = torch.cat((angle.new_zeros(1, head_width // 2), angle))
    cosine, sine = angle.cos(), angle.sin()
    table = torch.stack((torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)))
    return table[:, :, None]


def attend(
    q_BNHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor, mask_B11M: Tensor | None = None
) -> Tensor:
    """Softmax attention, [B, N, H * K]; query head h reads key head h // (H / G).

    `mask_B11M` says which keys are read; at least one of each image.
    """
    mixed_BHNK = F.scaled_dot_product_attention(
        q_BNHK.transpose(1, 2),
        k_BMGK.transpose(1, 2),
        v_BMGK.transpose(1, 2),
        mask_B11M,
        enable_gqa=True,
    )
    return mixed_BHNK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with per-head query and key norms and one fused projection."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        head_width = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        # Rows: queries, keys, values, head by head.
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_width, bias=False)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BNW: Tensor, rope: Tensor | None) -> Tensor:
        heads, kv_heads = self.heads, self.kv_heads
        joint = self.qkv(x_BNW).unflatten(-1, (heads + 2 * kv_heads, -1))
        q_BNHK, k_BNGK, v_BNGK = joint.split((heads, kv_heads, kv_heads), 2)
        q_BNHK, k_BNGK = self.query_norm(q_BNHK), self.key_norm(k_BNGK)
        return self.out(attend(rotate(q_BNHK, rope), rotate(k_BNGK, rope), v_BNGK))


class CrossAttention(nn.Module):
    """Grouped-query attention to condition tokens, whose keys and values can be kept."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        head_width = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(width, width, bias=False)
        # Rows: keys, then values, head by head.
        self.key_value = nn.Linear(width, 2 * kv_heads * head_width, bias=False)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, condition_BMW: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Project condition tokens to normed, rotated keys and to values, each [B, M, G, K]."""
        joint = self.key_value(condition_BMW).unflatten(-1, (2 * self.kv_heads, -1))
        k_BMGK, v_BMGK = joint.chunk(2, 2)
        return rotate(self.key_norm(k_BMGK), rope), v_BMGK

    def forward(
        self, x_BNW: Tensor, keys_values: tuple[Tensor, ...], rope: Tensor | None
    ) -> Tensor:
        """Attend to keys and values, and a mask where there is a third tensor."""
        q_BNHK = self.query(x_BNW).unflatten(-1, (self.heads, -1))
        return self.out(attend(rotate(self.query_norm(q_BNHK), rope), *keys_values))


class _GatedProduct(torch.autograd.Function):
    """silu(gate) * up of [..., 2 F], whose gradient is written into one tensor, not joined."""

    @staticmethod
    def forward(ctx: Any, joint: Tensor) -> Tensor:
        gate, up = joint.chunk(2, -1)
        opened = F.silu(gate)
        ctx.save_for_backward(joint, opened)
        return opened * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        joint, opened = ctx.saved_tensors
        gate, up = joint.chunk(2, -1)
        to_joint = torch.empty_like(joint)
        to_gate, to_up = to_joint.chunk(2, -1)
        torch.mul(grad, opened, out=to_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=to_gate)
        return to_joint


def gated_product(joint: Tensor) -> Tensor:
    """Return silu(gate) * up, where `joint` holds gate and up side by side."""
    if joint.requires_grad and not torch.compiler.is_compiling():
        return _GatedProduct.apply(joint)  # type: ignore[return-value]
    gate, up = joint.chunk(2, -1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer, 2020): down(silu(gate x) * up x), gate and up in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BNW: Tensor) -> Tensor:
        return self.down(gated_product(self.gate_up(x_BNW)))


class GELUMLP(nn.Module):
    """Plain feed-forward with biases: down(gelu(up x)), the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BNW)))


class DeepAdapter(nn.Module):
    """Deep map of condition tokens: h = linear c, then h + sigmoid(gate) * f^n(h)."""

    initial_gate = -2.2  # sigmoid: a tenth

    def __init__(self, inputs: int, width: int, depth: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gate = nn.Parameter(torch.full((width,), self.initial_gate))
        self.dropout = dropout

    def forward(self, condition_BMC: Tensor) -> Tensor:
        shortcut_BMW = deep_BMW = self.linear(condition_BMC)
        for norm, layer in zip(self.norms, self.layers):
            deep_BMW = F.dropout(F.gelu(norm(deep_BMW)), self.dropout, self.training)
            deep_BMW = layer(deep_BMW)
        return torch.addcmul(shortcut_BMW, self.gate.sigmoid().to(deep_BMW.dtype), deep_BMW)


def sinusoid(t_B: Tensor, channels: int, scale: float = 1000.0) -> Tensor:
    """Cosines and sines of scale * t, fp32 [B, channels]; frequencies fall from 1 to 1e-4."""
    half = channels // 2
    rate = -math.log(1e4) / half
    frequency = torch.exp(rate * torch.arange(half, dtype=torch.float32, device=t_B.device))
    angle = scale * t_B.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


class TimeEmbedding(nn.Module):
    """Embedding of the flow time t in [0, 1]: sinusoid, then a two-layer MLP."""

    def __init__(self, width: int, scale: float = 1000.0, channels: int = 256) -> None:
        super().__init__()
        self.channels, self.scale = channels, scale
        self.first = nn.Linear(channels, width)
        self.second = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed [B] to [B, W]; the sinusoids are fp32, then cast to the weights' dtype."""
        features = sinusoid(t_B, self.channels, self.scale).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))
