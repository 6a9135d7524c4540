"""The diffusion transformer (DiT; Peebles and Xie, 2023) that translates condition tokens.

Shape suffixes: B batch, N target tokens, D target width, M condition tokens, C condition width,
W network width, R rows of modulation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.condition import AnyCondition, Condition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.block import Block, Branch
from blip3o_lit.models.initialisation import Rules, narrow_normal
from blip3o_lit.models.layers import DeepAdapter, TimeEmbedding
from blip3o_lit.models.network import SPAN_SCALE, EncodedCondition, Network
from blip3o_lit.models.norms import modulate, norm_layer
from blip3o_lit.models.words import mean_word, words_alone


class DiT(Network):
    """Diffusion transformer with AdaLN-Zero: at the start each block is the identity.

    The output is exactly zero at the start (unless model.zero_init_output=false).

    Raises:
        UserError: If conditioning=aligned meets two grids of unequal size, or words.
    """

    reads_words = True

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        super().__init__(config, shape)
        source, target, width = shape.condition, shape.target, config.width
        self.aligned = config.conditioning == "aligned"
        if self.aligned and source is not None and source.grid != target.grid:
            raise UserError(
                f"model.conditioning=aligned needs equal grids, but the condition has "
                f"{source.grid} and the target {target.grid}; use model.conditioning=cross"
            )
        self.input = nn.Linear(target.width, width)
        if source is not None:
            self.condition = _adapter(config, source.width)
            # Projects the mean condition token. Its name stands in checkpoints.
            self.pool = nn.Linear(source.width, width)
        if shape.words is not None:
            self.words = _adapter(config, shape.words.width)
            self.words_pool = nn.Linear(shape.words.width, width)
        # A target's CLS token has no condition token at its place where the condition has no CLS
        # of its own: a learned vector stands in.
        self.cls_condition: nn.Parameter | None = None
        if self.aligned and target.cls and source is not None and not source.cls:
            self.cls_condition = nn.Parameter(torch.empty(width))
        self.positions = self.positions_condition = None
        if config.positions in ("learned", "both"):
            self.positions = nn.Parameter(torch.empty(target.tokens, width))
            if not self.aligned and source is not None:
                self.positions_condition = nn.Parameter(torch.empty(source.tokens, width))
        self.time = TimeEmbedding(width, config.time_scale)  # model.time says where it enters
        if config.second_time:
            self.span = TimeEmbedding(width, SPAN_SCALE)
        self.modulation: nn.Linear | None = None
        self.output_norm: nn.Module | None = None
        if config.time == "adaln":
            # One matmul makes shift, scale and gate of every branch, then the output norm's shift
            # and scale.
            branches = 2 if self.aligned else 3  # attention and mlp; cross-attention between them
            rows = config.depth * branches * 3 + 2
            self.modulation = nn.Linear(width, rows * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        if config.time == "tokens":
            self.output_norm = norm_layer(config.norm, width)
        self.output = nn.Linear(width, target.width)
        self.init_weights()

    def initial_rules(self) -> Rules:
        own = ("cls_condition", "positions", "positions_condition")
        rules: Rules = {"modulation.weight": 0.0, **dict.fromkeys(own, narrow_normal)}
        if self.config.zero_init_output:
            rules["output.weight"] = 0.0
        for name, module in self.named_modules():
            if isinstance(module, Branch) and self.config.layer_scale is not None:
                rules[f"{name}.scale"] = self.config.layer_scale
            elif isinstance(module, DeepAdapter):
                rules[f"{name}.gate"] = module.initial_gate
        return rules

    def encode(self, condition: AnyCondition) -> EncodedCondition:
        if isinstance(condition, Condition):
            return self._with_words(condition)
        pooled_BW = self._pooled_grid(condition)
        if not self.aligned:
            tokens_BMW, rope = self._grid_tokens(condition), self.rope_condition
            pairs = tuple(block.keys_values(tokens_BMW, rope) for block in self.blocks)  # type: ignore[operator]
            return EncodedCondition(None, pooled_BW, pairs)
        if self.shape.grid.cls and not self.shape.target.cls:
            condition = condition[:, 1:]
        tokens_BNW = self._grid_tokens(condition)
        if self.cls_condition is not None:
            cls_BNW = self.cls_condition.to(tokens_BNW.dtype).expand(tokens_BNW.shape[0], 1, -1)
            tokens_BNW = torch.cat((cls_BNW, tokens_BNW), 1)
        return EncodedCondition(tokens_BNW, pooled_BW, None)

    def _with_words(self, condition: Condition) -> EncodedCondition:
        dtype = self.words_pool.weight.dtype
        words_BLE, grid_BMW = words_alone(condition), None
        pooled_BW = self.words_pool(mean_word(words_BLE, condition).to(dtype))
        if condition.grid is not None:
            pooled_BW = pooled_BW + self._pooled_grid(condition.grid)
            grid_BMW = self._grid_tokens(condition.grid)
        return self.attended(condition, grid_BMW, self.words(words_BLE.to(dtype)), pooled_BW)

    def _pooled_grid(self, condition_BMC: Tensor) -> Tensor:
        dtype = self.pool.weight.dtype
        mean_BC = condition_BMC.mean(1, dtype=torch.promote_types(dtype, torch.float32))
        return self.pool(mean_BC.to(dtype))

    def _grid_tokens(self, condition_BMC: Tensor) -> Tensor:
        tokens_BMW = self.condition(condition_BMC.to(self.pool.weight.dtype))
        if self.positions_condition is not None:
            tokens_BMW = tokens_BMW + self.positions_condition.to(tokens_BMW.dtype)
        return tokens_BMW

    def forward(
        self,
        x_BND: Tensor,
        t_B: Tensor,
        condition: AnyCondition | EncodedCondition,
        s_B: Tensor | None = None,
    ) -> Tensor:
        encoded = self.encoded(condition)
        x_BNW = self.input(x_BND.to(self.input.weight.dtype))
        if encoded.tokens is not None:
            x_BNW = x_BNW + encoded.tokens
        if self.positions is not None:
            x_BNW = x_BNW + self.positions.to(x_BNW.dtype)
        signal_B1W = (self.embedded_times(t_B, s_B) + encoded.pooled)[:, None]
        if self.modulation is None:
            x_BNW = x_BNW + signal_B1W.to(x_BNW.dtype)
            x_BNW = self.run_blocks(x_BNW, [None] * len(self.blocks), encoded)
            x_BNW = self.output_norm(x_BNW)  # type: ignore[misc]
        else:
            rows_B1RW = self.modulation(F.silu(signal_B1W)).to(x_BNW.dtype)
            rows_B1RW = rows_B1RW.unflatten(-1, (-1, self.config.width))
            shift_B1W, scale_B1W = rows_B1RW[:, :, -2:].unbind(2)
            by_block = rows_B1RW[:, :, :-2].chunk(len(self.blocks), 2)
            x_BNW = self.run_blocks(x_BNW, by_block, encoded)
            x_BNW = modulate(x_BNW, shift_B1W, scale_B1W, self.config.norm)
        return self.output(x_BNW).to(x_BND.dtype)


def _adapter(config: ModelConfig, inputs: int) -> nn.Module:
    """Return the map of condition tokens to the network's width."""
    if config.adapter_depth:
        return DeepAdapter(inputs, config.width, config.adapter_depth, config.dropout)
    return nn.Linear(inputs, config.width)
