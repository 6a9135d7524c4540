"""Building blocks of the transformers: rotary embedding, attention, feed-forward, adapter, time.

Shape suffixes: B batch, N target tokens, M condition tokens, W network width, H query heads,
C condition width,
G key and value heads, K head width, F feed-forward width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.models.norms import RMSNorm, rotated, rotated_rms_norm


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
        extent: Rows and columns that the positions span, when this grid shall lie over another
            grid of that size (cells keep their centres); the grid's own size by default.
        base: Ratio between the fastest and (nearly) the slowest frequency.
    """
    extent = extent or shape.grid
    quarter = head_width // 4
    frequency = base ** -(torch.arange(quarter, dtype=torch.float32) / quarter)
    rows, columns = (
        (torch.arange(cells, dtype=torch.float32) + 0.5) * (span / cells) - 0.5
        for cells, span in zip(shape.grid, extent)
    )
    by_row = (rows[:, None] * frequency)[:, None].expand(-1, shape.grid[1], -1)
    by_column = (columns[:, None] * frequency)[None].expand(shape.grid[0], -1, -1)
    angle = torch.cat((by_row, by_column), -1).reshape(shape.patches, head_width // 2)
    if shape.cls:
        angle = torch.cat((angle.new_zeros(1, head_width // 2), angle))
    cosine, sine = angle.cos(), angle.sin()
    table = torch.stack((torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)))
    return table[:, :, None]


def rotate(x_BNHK: Tensor, rope: Tensor | None) -> Tensor:
    """Rotate queries or keys by a table of `rope_table`; None leaves them as they are."""
    return x_BNHK if rope is None else rotated(x_BNHK, rope.to(x_BNHK.dtype))


def attend(q_BNHK: Tensor, k_BMGK: Tensor, v_BMGK: Tensor) -> Tensor:
    """Softmax attention without a mask; query head h reads key head h // (H / G).

    Returns:
        [B, N, H * K].
    """
    mixed_BHNK = F.scaled_dot_product_attention(
        q_BNHK.transpose(1, 2), k_BMGK.transpose(1, 2), v_BMGK.transpose(1, 2), enable_gqa=True
    )
    return mixed_BHNK.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Grouped-query self-attention with per-head query and key norms and one fused projection."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        """Make the projections; rows of `qkv` are queries, keys, values, head by head."""
        super().__init__()
        head_width = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_width, bias=False)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BNW: Tensor, rope: Tensor | None) -> Tensor:
        """Mix the tokens of [B, N, W]."""
        heads, kv_heads = self.heads, self.kv_heads
        joint = self.qkv(x_BNW).unflatten(-1, (heads + 2 * kv_heads, -1))
        both, v_BNGK = joint.split((heads + kv_heads, kv_heads), 2)
        # Queries and keys are normed and rotated at once.
        norms = self.query_norm.weight.expand(heads, -1), self.key_norm.weight.expand(kv_heads, -1)
        both = rotated_rms_norm(both, torch.cat(norms), rope, self.query_norm.eps)
        q_BNHK, k_BNGK = both.split((heads, kv_heads), 2)
        return self.out(attend(q_BNHK, k_BNGK, v_BNGK))


class CrossAttention(nn.Module):
    """Grouped-query attention to condition tokens, whose keys and values can be kept."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        """Make the projections; rows of `key_value` are keys, then values, head by head."""
        super().__init__()
        head_width = width // heads
        self.heads, self.kv_heads = heads, kv_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * kv_heads * head_width, bias=False)
        self.query_norm = RMSNorm(head_width)
        self.key_norm = RMSNorm(head_width)
        self.out = nn.Linear(width, width, bias=False)

    def keys_values(self, condition_BMW: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor]:
        """Project condition tokens to normed, rotated keys and to values, each [B, M, G, K]."""
        joint = self.key_value(condition_BMW).unflatten(-1, (2 * self.kv_heads, -1))
        k_BMGK, v_BMGK = joint.chunk(2, 2)
        return rotated_rms_norm(k_BMGK, self.key_norm.weight, rope, self.key_norm.eps), v_BMGK

    def forward(
        self, x_BNW: Tensor, keys_values: tuple[Tensor, Tensor], rope: Tensor | None
    ) -> Tensor:
        """Let each token of [B, N, W] read the condition."""
        q_BNHK = self.query(x_BNW).unflatten(-1, (self.heads, -1))
        norm = self.query_norm
        q_BNHK = rotated_rms_norm(q_BNHK, norm.weight, rope, norm.eps)
        return self.out(attend(q_BNHK, *keys_values))


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer, 2020): down(silu(gate x) * up x), gate and up in one matrix."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the two matrices; rows of `gate_up` are gate, then up."""
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """Transform each token of [B, N, W]."""
        gate, up = self.gate_up(x_BNW).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class GELUMLP(nn.Module):
    """Plain feed-forward with biases: down(gelu(up x)), the exact GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        """Make the two layers."""
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x_BNW: Tensor) -> Tensor:
        """Transform each token of [B, N, W]."""
        return self.down(F.gelu(self.up(x_BNW)))


class DeepAdapter(nn.Module):
    """Deep map of condition tokens: h = linear c, then h + sigmoid(gate) * f^n(h)."""

    initial_gate = -2.2
    """The gate starts at a tenth: sigmoid(-2.2)."""

    def __init__(self, inputs: int, width: int, depth: int, dropout: float) -> None:
        """Make the linear map and `depth` further layers."""
        super().__init__()
        self.linear = nn.Linear(inputs, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.gate = nn.Parameter(torch.full((width,), self.initial_gate))
        self.dropout = dropout

    def forward(self, condition_BMC: Tensor) -> Tensor:
        """Map [B, M, C] to [B, M, W]."""
        shortcut_BMW = deep_BMW = self.linear(condition_BMC)
        for norm, layer in zip(self.norms, self.layers):
            deep_BMW = F.dropout(F.gelu(norm(deep_BMW)), self.dropout, self.training)
            deep_BMW = layer(deep_BMW)
        return torch.addcmul(shortcut_BMW, self.gate.sigmoid().to(deep_BMW.dtype), deep_BMW)


def sinusoid(t_B: Tensor, channels: int, period: float = 10_000.0) -> Tensor:
    """Cosines and sines of 1000 t, fp32 [B, channels]; frequencies fall from 1 to 1 / period."""
    half = channels // 2
    rate = -math.log(period) / half
    frequency = torch.exp(rate * torch.arange(half, dtype=torch.float32, device=t_B.device))
    angle = 1000.0 * t_B.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


class TimeEmbedding(nn.Module):
    """Embedding of the flow time t in [0, 1]: sinusoid, then a two-layer MLP."""

    def __init__(self, width: int, channels: int = 256) -> None:
        """Make the MLP from `channels` sinusoids to `width`."""
        super().__init__()
        self.channels = channels
        self.first = nn.Linear(channels, width)
        self.second = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed [B] to [B, W]; the sinusoids are fp32, then cast to the weights' dtype."""
        features = sinusoid(t_B, self.channels).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(features)))
