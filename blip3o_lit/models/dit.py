"""The diffusion transformer (DiT; Peebles and Xie, 2023) that translates condition tokens.

Shape suffixes: B batch, N target tokens, D target width, M condition tokens, C condition width,
W network width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.shape import PairShape
from blip3o_lit.models.layers import (
    CrossAttention,
    SelfAttention,
    SwiGLU,
    TimeEmbedding,
    modulate,
    rope_table,
)


class EncodedCondition(NamedTuple):
    """What the network needs of a condition; computed once a sample, reused at every step."""

    tokens: Tensor | None
    """conditioning=aligned: projected condition in the target's token order, [B, N, W]."""
    pooled: Tensor
    """Mean condition token, projected; joins the time embedding, [B, W]."""
    keys_values: tuple[tuple[Tensor, Tensor], ...] | None
    """conditioning=cross: keys and values of each block, each [B, M, G, K]."""


class Block(nn.Module):
    """One transformer block with AdaLN-Zero: self-attention, cross-attention if asked, SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        """Make the branches; each is normed, modulated and gated from outside."""
        super().__init__()
        self.attention = SelfAttention(config.width, config.heads, config.kv_heads)
        self.cross = (
            CrossAttention(config.width, config.heads, config.kv_heads)
            if config.conditioning == "cross"
            else None
        )
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(
        self,
        x_BNW: Tensor,
        modulation: Tensor,
        rope: Tensor,
        keys_values: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Update [B, N, W]; `modulation` [B, 1, 3 * branches, W] is shift, scale, gate a branch."""
        parts = modulation.unbind(2)
        shift, scale, gate = parts[:3]
        x_BNW = torch.addcmul(x_BNW, gate, self.attention(modulate(x_BNW, shift, scale), rope))
        if self.cross is not None and keys_values is not None:
            shift, scale, gate = parts[3:6]
            read = self.cross(modulate(x_BNW, shift, scale), keys_values, rope)
            x_BNW = torch.addcmul(x_BNW, gate, read)
        shift, scale, gate = parts[-3:]
        return torch.addcmul(x_BNW, gate, self.mlp(modulate(x_BNW, shift, scale)))


class DiT(nn.Module):
    """Diffusion transformer from (x_t, t, condition) to the raw output, [B, N, D].

    The condition, the target and x_t are standardised tokens. At initialisation every gate and the
    output layer are zero, so each block is the identity and the output is exactly zero.

    Raises:
        UserError: If conditioning=aligned meets two grids of unequal size.
    """

    rope: Tensor
    rope_condition: Tensor | None

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        """Build the network for one pair of token shapes."""
        super().__init__()
        aligned = config.conditioning == "aligned"
        if aligned and shape.condition.grid != shape.target.grid:
            raise UserError(
                f"model.conditioning=aligned needs equal grids, but the condition has "
                f"{shape.condition.grid} and the target {shape.target.grid}; "
                "use model.conditioning=cross"
            )
        self.config, self.shape = config, shape
        width = config.width
        self.branches = 2 if aligned else 3
        self.input = nn.Linear(shape.target.width, width)
        self.condition = nn.Linear(shape.condition.width, width)
        self.pool = nn.Linear(shape.condition.width, width)
        lone_cls = aligned and shape.target.cls and not shape.condition.cls
        self.cls_condition = nn.Parameter(torch.empty(width)) if lone_cls else None
        self.time = TimeEmbedding(width)
        # One matmul makes the shifts, scales and gates of all blocks and of the output norm.
        self.modulation = nn.Linear(width, (3 * self.branches * config.depth + 2) * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output = nn.Linear(width, shape.target.width)
        self.register_buffer("rope", self._rope_table("target"), persistent=False)
        table = None if aligned else self._rope_table("condition")
        self.register_buffer("rope_condition", table, persistent=False)
        self.init_weights()

    def _rope_table(self, side: str) -> Tensor:
        """Compute one side's rotary table; the condition's grid is laid over the target's."""
        head_width = self.config.width // self.config.heads
        return rope_table(getattr(self.shape, side), head_width, self.shape.target.grid)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter and buffer; call again after materialising from the meta device."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif module is not self and isinstance(getattr(module, "weight", None), nn.Parameter):
                nn.init.ones_(module.weight)  # type: ignore[arg-type]
        for layer in (self.time.first, self.time.second):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.modulation, self.output):
            nn.init.zeros_(layer.weight)
        if self.cls_condition is not None:
            nn.init.normal_(self.cls_condition, std=0.02)
        self.rope.copy_(self._rope_table("target"))
        if self.rope_condition is not None:
            self.rope_condition.copy_(self._rope_table("condition"))

    def encode(self, condition_BMC: Tensor) -> EncodedCondition:
        """Project a condition once, for any number of forward calls."""
        condition_BMC = condition_BMC.to(self.condition.weight.dtype)
        pooled_BW = self.pool(condition_BMC.mean(1))
        if self.config.conditioning == "cross":
            tokens_BMW = self.condition(condition_BMC)
            pairs = tuple(
                block.cross.keys_values(tokens_BMW, self.rope_condition)  # type: ignore[union-attr]
                for block in self.blocks
            )
            return EncodedCondition(None, pooled_BW, pairs)
        if self.shape.condition.cls and not self.shape.target.cls:
            condition_BMC = condition_BMC[:, 1:]
        tokens_BNW = self.condition(condition_BMC)
        if self.cls_condition is not None:
            cls_BNW = self.cls_condition.to(tokens_BNW.dtype).expand(len(tokens_BNW), 1, -1)
            tokens_BNW = torch.cat((cls_BNW, tokens_BNW), 1)
        return EncodedCondition(tokens_BNW, pooled_BW, None)

    def forward(self, x_BND: Tensor, t_B: Tensor, condition: Tensor | EncodedCondition) -> Tensor:
        """Evaluate the network.

        Args:
            x_BND: Noisy target tokens x_t.
            t_B: Times in [0, 1], 0 is noise.
            condition: Condition tokens [B, M, C], or what `encode` made of them.

        Returns:
            The raw output [B, N, D], in the dtype of `x_BND`.
        """
        encoded = condition if isinstance(condition, EncodedCondition) else self.encode(condition)
        x_BNW = self.input(x_BND.to(self.input.weight.dtype))
        if encoded.tokens is not None:
            x_BNW = x_BNW + encoded.tokens
        modulation = self.modulation(F.silu(self.time(t_B) + encoded.pooled))
        modulation = modulation.unflatten(-1, (1, -1, self.config.width))
        *by_block, last = modulation.split(3 * self.branches, 2)
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        rope = self.rope.to(x_BNW.dtype)
        for index, block in enumerate(self.blocks):
            pair = encoded.keys_values[index] if encoded.keys_values is not None else None
            if recompute:
                x_BNW = checkpoint(block, x_BNW, by_block[index], rope, pair, use_reentrant=False)  # type: ignore[assignment]
            else:
                x_BNW = block(x_BNW, by_block[index], rope, pair)
        shift, scale = last.unbind(2)
        return self.output(modulate(x_BNW, shift, scale)).to(x_BND.dtype)

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block in place; names in the state dict stay as they are."""
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True)

    def parameter_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters for weight decay (matrices) and those without (the rest)."""
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        return matrices, [p for p in self.parameters() if p.ndim < 2]

    def encode_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of `encode`; a multiply-add counts 2."""
        config, condition = self.config, self.shape.condition
        macs = condition.width * config.width
        if config.conditioning == "cross":
            kept = 2 * config.width * config.width // config.heads * config.kv_heads
            macs += condition.tokens * (condition.width * config.width + config.depth * kept)
        else:
            tokens = condition.tokens - (condition.cls and not self.shape.target.cls)
            macs += tokens * condition.width * config.width
        return 2 * batch * macs

    def forward_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of one forward call with an unencoded condition; training costs 3 times it.

        Per image 2 N P_token + 2 M P_condition + 2 P_image + 4 W N (N + M) a block, the M term for
        cross-attention alone.
        """
        config, target = self.config, self.shape.target
        width, tokens = config.width, target.tokens
        narrow = width // config.heads * config.kv_heads
        per_token = 2 * width * (width + narrow) + 3 * width * config.mlp_width
        keys = tokens
        if config.conditioning == "cross":
            per_token += 2 * width * width
            keys += self.shape.condition.tokens
        per_block = tokens * per_token + 2 * width * tokens * keys
        per_image = (self.time.channels + width + self.modulation.out_features) * width
        macs = config.depth * per_block + 2 * tokens * target.width * width + per_image
        return 2 * batch * macs + self.encode_flops(batch)
