"""The diffusion transformer (DiT; Peebles and Xie, 2023) that translates condition tokens.

Shape suffixes: B batch, N target tokens, D target width, M condition tokens, C condition width,
W network width, R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.block import Block, Branch
from blip3o_lit.models.initialisation import Rules, narrow_normal
from blip3o_lit.models.layers import DeepAdapter, TimeEmbedding, rope_table
from blip3o_lit.models.network import EncodedCondition, Network
from blip3o_lit.models.norms import modulate, norm_layer


class DiT(Network):
    """Diffusion transformer with AdaLN-Zero: at the start each block is the identity.

    The output is exactly zero at the start (unless model.zero_init_output=false).

    Raises:
        UserError: If conditioning=aligned meets two grids of unequal size.
    """

    rope: Tensor | None
    rope_condition: Tensor | None

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        """Build the network for one pair of token shapes."""
        super().__init__(config, shape)
        source, target, width = shape.condition, shape.target, config.width
        self.aligned = config.conditioning == "aligned"
        if self.aligned and source.grid != target.grid:
            raise UserError(
                f"model.conditioning=aligned needs equal grids, but the condition has "
                f"{source.grid} and the target {target.grid}; use model.conditioning=cross"
            )
        self.input = nn.Linear(target.width, width)
        deep, dropout = config.adapter_depth, config.dropout
        self.condition = (
            DeepAdapter(source.width, width, deep, dropout)
            if deep
            else nn.Linear(source.width, width)
        )
        self.pool = nn.Linear(source.width, width)
        lone_cls = self.aligned and target.cls and not source.cls
        self.cls_condition = nn.Parameter(torch.empty(width)) if lone_cls else None
        learned = config.positions == "learned"
        self.positions = nn.Parameter(torch.empty(target.tokens, width)) if learned else None
        learned = learned and not self.aligned
        self.positions_condition = (
            nn.Parameter(torch.empty(source.tokens, width)) if learned else None
        )
        self.time = TimeEmbedding(width)
        self.rows = 2 + config.depth * (6 if self.aligned else 9)
        # One matmul makes the shifts, scales and gates of all blocks and of the output norm.
        adaln = config.time == "adaln"
        self.modulation = nn.Linear(width, self.rows * width) if adaln else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.output_norm = None if adaln else norm_layer(config.norm, width)
        self.output = nn.Linear(width, target.width)
        for name, side in (("rope", "target"), ("rope_condition", "condition")):
            self.register_buffer(name, self._rope_table(side), persistent=False)
        self.init_weights()

    def _rope_table(self, side: str) -> Tensor | None:
        """Compute one side's rotary table; the condition's grid is laid over the target's."""
        config = self.config
        if config.positions != "rope":
            return None
        if side == "condition" and (self.aligned or not config.key_rope):
            return None
        head_width = config.width // config.heads
        return rope_table(getattr(self.shape, side), head_width, self.shape.target.grid)

    def start_rules(self) -> Rules:
        """Return the start values that differ from a layer's usual ones."""
        rules: Rules = dict.fromkeys(("time.first.weight", "time.second.weight"), narrow_normal)
        rules |= dict.fromkeys(("cls_condition", "positions", "positions_condition"), narrow_normal)
        rules["modulation.weight"] = 0.0
        if self.config.zero_init_output:
            rules["output.weight"] = 0.0
        for name, module in self.named_modules():
            if isinstance(module, Branch) and self.config.layer_scale is not None:
                rules[f"{name}.scale"] = self.config.layer_scale
            elif isinstance(module, DeepAdapter):
                rules[f"{name}.gate"] = module.initial_gate
        return rules

    def fill_buffers(self) -> None:
        """Compute the rotary tables."""
        for table, side in ((self.rope, "target"), (self.rope_condition, "condition")):
            if table is not None:
                table.copy_(self._rope_table(side))  # type: ignore[arg-type]

    def encode(self, condition_BMC: Tensor) -> EncodedCondition:
        """Project a condition once, for any number of forward calls."""
        dtype = self.pool.weight.dtype
        mean_BC = condition_BMC.mean(1, dtype=torch.promote_types(dtype, torch.float32))
        pooled_BW = self.pool(mean_BC.to(dtype))
        if not self.aligned:
            tokens_BMW = self.condition(condition_BMC.to(dtype))
            if self.positions_condition is not None:
                tokens_BMW = tokens_BMW + self.positions_condition.to(tokens_BMW.dtype)
            rope = self.rope_condition
            pairs = tuple(block.keys_values(tokens_BMW, rope) for block in self.blocks)  # type: ignore[operator]
            return EncodedCondition(None, pooled_BW, pairs)
        if self.shape.condition.cls and not self.shape.target.cls:
            condition_BMC = condition_BMC[:, 1:]
        tokens_BNW = self.condition(condition_BMC.to(dtype))
        if self.cls_condition is not None:
            cls_BNW = self.cls_condition.to(tokens_BNW.dtype).expand(len(tokens_BNW), 1, -1)
            tokens_BNW = torch.cat((cls_BNW, tokens_BNW), 1)
        return EncodedCondition(tokens_BNW, pooled_BW, None)

    def forward(self, x_BND: Tensor, t_B: Tensor, condition: Tensor | EncodedCondition) -> Tensor:
        """Evaluate the network; see `Network.forward`."""
        encoded = self.encoded(condition)
        x_BNW = self.input(x_BND.to(self.input.weight.dtype))
        if encoded.tokens is not None:
            x_BNW = x_BNW + encoded.tokens
        if self.positions is not None:
            x_BNW = x_BNW + self.positions.to(x_BNW.dtype)
        signal_B1W = (self.time(t_B) + encoded.pooled)[:, None]
        by_block: Sequence[Tensor | None] = [None] * len(self.blocks)
        last = None
        if self.modulation is None:
            x_BNW = x_BNW + signal_B1W.to(x_BNW.dtype)
        else:
            rows_B1RW = self.modulation(F.silu(signal_B1W)).to(x_BNW.dtype)
            rows_B1RW = rows_B1RW.unflatten(-1, (self.rows, self.config.width))
            last = rows_B1RW[:, :, -2:]
            by_block = rows_B1RW[:, :, :-2].chunk(len(self.blocks), 2)
        rope = None if self.rope is None else self.rope.to(x_BNW.dtype)
        pairs = encoded.keys_values or [None] * len(self.blocks)
        x_BNW = self.run_blocks(x_BNW, ((m, rope, p) for m, p in zip(by_block, pairs)))
        if self.output_norm is not None:
            x_BNW = self.output_norm(x_BNW)
        else:
            x_BNW = modulate(x_BNW, *last.unbind(2), self.config.norm)  # type: ignore[union-attr]
        return self.output(x_BNW).to(x_BND.dtype)

    def encode_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of `encode`; a multiply-add counts 2."""
        config, source = self.config, self.shape.condition
        width, tokens = config.width, source.tokens
        per_token = (source.width + config.adapter_depth * width) * width
        if self.aligned:
            tokens -= int(source.cls and not self.shape.target.cls)
        else:
            per_token += config.depth * 2 * width * (width // config.heads * config.kv_heads)
        return 2 * batch * (tokens * per_token + source.width * width)

    def forward_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of a forward call with an unencoded condition; training costs 3 times it.

        Per image 2 N P_token + 2 M P_condition + 2 P_image + 4 W N (N + M) a block, the M term for
        cross-attention alone.
        """
        config, target = self.config, self.shape.target
        width, tokens, keys = config.width, target.tokens, target.tokens
        narrow = width // config.heads * config.kv_heads
        matrices = 3 if config.mlp == "swiglu" else 2
        per_token = 2 * width * (width + narrow) + matrices * width * config.mlp_width
        if not self.aligned:
            per_token += 2 * width * width
            keys += self.shape.condition.tokens
        per_block = tokens * per_token + 2 * width * tokens * keys
        rows = 0 if self.modulation is None else self.rows
        per_image = (self.time.channels + (1 + rows) * width) * width
        macs = config.depth * per_block + 2 * tokens * target.width * width + per_image
        return 2 * batch * macs + self.encode_flops(batch)
