"""The DiT's block: self-attention, cross-attention if asked, feed-forward, each a gated residual.

Shape suffixes: B batch, N target tokens, M condition tokens, W network width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.layers import GELUMLP, CrossAttention, SelfAttention, SwiGLU
from blip3o_lit.models.network import KeysValues
from blip3o_lit.models.norms import modulate, norm_layer


class Branch(nn.Module):
    """One residual branch: x + gate * dropout(scale * norm(layer(modulated norm(x)))).

    With time=adaln the first norm has no weight of its own and shift, scale and gate come from
    outside (AdaLN-Zero); with time=tokens it has a weight and there is no gate. The second norm
    (sandwich) and the learned scale (LayerScale; Touvron et al., 2021) are options.
    """

    def __init__(self, layer: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.kind = config.norm
        own = config.time == "tokens"
        self.norm = norm_layer(config.norm, config.width) if own else None
        self.after = norm_layer(config.norm, config.width) if config.sandwich_norm else None
        start = config.layer_scale
        self.scale = None if start is None else nn.Parameter(torch.full((config.width,), start))

    def forward(self, x_BNW: Tensor, modulation: Tensor | None, *inputs: object) -> Tensor:
        """Update [B, N, W]; `modulation`, [B, 1, 3, W], holds shift, scale and gate."""
        gate = None
        if self.norm is not None:
            added = self.layer(self.norm(x_BNW), *inputs)
        else:
            shift, scale, gate = modulation.unbind(2)  # type: ignore[union-attr]
            added = self.layer(modulate(x_BNW, shift, scale, self.kind), *inputs)
        if self.after is not None:
            added = self.after(added)
        if self.scale is not None:
            added = added * self.scale.to(added.dtype)
        if self.dropout:
            added = F.dropout(added, self.dropout, self.training)
        return x_BNW + added if gate is None else torch.addcmul(x_BNW, gate, added)


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = (config.width, config.heads, config.kv_heads)
        feed_forward = SwiGLU if config.mlp == "swiglu" else GELUMLP
        self.attention = Branch(SelfAttention(*sizes), config)
        cross = config.conditioning == "cross"
        self.cross = Branch(CrossAttention(*sizes), config) if cross else None
        self.mlp = Branch(feed_forward(config.width, config.mlp_width), config)

    def keys_values(self, condition_BMW: Tensor, rope: Tensor | None) -> KeysValues:
        return self.cross.layer.keys_values(condition_BMW, rope)  # type: ignore[union-attr, operator]

    def forward(
        self,
        x_BNW: Tensor,
        modulation: Tensor | None,
        rope: Tensor | None,
        keys_values: KeysValues | None,
    ) -> Tensor:
        """Update [B, N, W]; `modulation` is [B, 1, 3 * branches, W] or None."""
        parts = [None] * 3 if modulation is None else modulation.split(3, 2)
        x_BNW = self.attention(x_BNW, parts[0], rope)
        if self.cross is not None:
            x_BNW = self.cross(x_BNW, parts[1], keys_values, rope)
        return self.mlp(x_BNW, parts[-1])
