"""NextDiT: the Lumina-Next transformer as the official BLIP3-o and seed 001 use it.

Each block has one normed input for self-attention and for cross-attention to the condition; the
second is gated a head by tanh of a zero-initialised number, both share one output matrix. What a
branch adds is normed again (sandwich) and gated by tanh; modulation scales, it never shifts.
The released weights count time from data to noise and predict noise - data; here t runs from noise
to data, so the sinusoids are those of 1 - t and `load_official` turns the output's sign.

Shape suffixes: B batch, N target tokens, D target width, M condition tokens, C condition width,
W network width, H query heads, G key and value heads, K head width, T time embedding width,
R rows of modulation.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.base.condition import AnyCondition, Condition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.initialisation import Rules
from blip3o_lit.models.layers import SwiGLU, TimeEmbedding, attend
from blip3o_lit.models.network import SPAN_SCALE, EncodedCondition, KeysValues, Network
from blip3o_lit.models.norms import RMSNorm, rotate
from blip3o_lit.models.official import from_official, to_official
from blip3o_lit.models.words import mean_word, words_alone

EPS = 1e-5
"""Of every norm but the last, as in the released weights."""


class NextDiTBlock(nn.Module):
    """One Lumina-Next block; query and key norms are LayerNorms over all heads together."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads, self.kv_heads = config.width, config.heads, config.kv_heads
        narrow = width // self.heads * self.kv_heads
        self.norm = RMSNorm(width, EPS)
        # Rows: queries, keys, values of self-attention, then queries of cross-attention.
        self.projection = nn.Linear(width, 2 * (width + narrow), bias=False)
        self.query_norm, self.key_norm = nn.LayerNorm(width, EPS), nn.LayerNorm(narrow, EPS)
        self.condition_norm = RMSNorm(width, EPS)
        self.key_value = nn.Linear(width, 2 * narrow, bias=False)
        self.cross_query_norm = nn.LayerNorm(width, EPS)
        self.cross_key_norm = nn.LayerNorm(narrow, EPS)
        self.cross_gate = nn.Parameter(torch.empty(self.heads))
        self.out = nn.Linear(width, width, bias=False)
        self.after_attention = RMSNorm(width, EPS)
        self.mlp_norm = RMSNorm(width, EPS)
        self.mlp = SwiGLU(width, config.mlp_width)
        self.after_mlp = RMSNorm(width, EPS)

    def keys_values(self, condition_BMW: Tensor, rope: Tensor | None) -> KeysValues:
        k_BMGK, v_BMGK = self.key_value(self.condition_norm(condition_BMW)).chunk(2, -1)
        k_BMGK = self.cross_key_norm(k_BMGK).unflatten(-1, (self.kv_heads, -1))
        return rotate(k_BMGK, rope), v_BMGK.unflatten(-1, (self.kv_heads, -1))

    def forward(
        self, x_BNW: Tensor, modulation: Tensor, rope: Tensor | None, keys_values: KeysValues
    ) -> Tensor:
        """Update [B, N, W]; rows of `modulation`, [B, 1, 4, W]: scale and gate, twice."""
        scale, gate, mlp_scale, mlp_gate = modulation.unbind(2)
        read = self._attend(self.norm(x_BNW) * (1 + scale), rope, keys_values)
        x_BNW = torch.addcmul(x_BNW, gate.tanh(), self.after_attention(self.out(read)))
        added = self.mlp(self.mlp_norm(x_BNW) * (1 + mlp_scale))
        return torch.addcmul(x_BNW, mlp_gate.tanh(), self.after_mlp(added))

    def _attend(self, x_BNW: Tensor, rope: Tensor | None, keys_values: KeysValues) -> Tensor:
        """Self-attention plus gated cross-attention, before the output matrix."""
        width, narrow = x_BNW.shape[-1], self.key_norm.normalized_shape[0]
        widths = (width, narrow, narrow, width)
        query, key, value, cross_query = self.projection(x_BNW).split(widths, -1)
        q_BNHK = self.query_norm(query).unflatten(-1, (self.heads, -1))
        k_BNGK = self.key_norm(key).unflatten(-1, (self.kv_heads, -1))
        v_BNGK = value.unflatten(-1, (self.kv_heads, -1))
        cross_BNHK = self.cross_query_norm(cross_query).unflatten(-1, (self.heads, -1))
        own = attend(rotate(q_BNHK, rope), rotate(k_BNGK, rope), v_BNGK)
        read = attend(rotate(cross_BNHK, rope), *keys_values)
        gate_W = self.cross_gate.tanh().repeat_interleave(width // self.heads)
        return torch.addcmul(own, gate_W.to(read.dtype), read)


class Words(nn.Module):
    """Projects words as the caption projection does a grid, and their mean into the modulation."""

    def __init__(self, inputs: int, width: int, signal: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, width)
        self.norm, self.pool = nn.LayerNorm(width, EPS), nn.Linear(width, signal)

    def forward(self, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return tokens [B, L, W] and [B, T]."""
        dtype = self.first.weight.dtype
        hidden_BLW = self.first(words_alone(condition).to(dtype))
        tokens_BLW = self.second(F.gelu(hidden_BLW, approximate="tanh"))
        return tokens_BLW, self.pool(self.norm(mean_word(tokens_BLW, condition).to(dtype)))


class NextDiT(Network):
    """The Lumina-Next transformer over a token grid, conditioned by cross-attention.

    At the start every gate and the output layer are zero: blocks are the identity, the output zero.
    """

    reads_words = True
    rope_base = 10_000.0  # as in the released weights

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        super().__init__(config, shape)
        width, signal = config.width, min(config.width, 1024)
        self.input = nn.Linear(shape.target.width, width)
        if shape.condition is not None:
            self.caption_first = nn.Linear(shape.condition.width, width)
            self.caption_second = nn.Linear(width, width)
            self.pool_norm = nn.LayerNorm(width, EPS)
            self.pool = nn.Linear(width, signal)
        if shape.words is not None:
            self.words = Words(shape.words.width, width, signal)
        self.time = TimeEmbedding(signal, config.time_scale)
        if config.second_time:
            self.span = TimeEmbedding(signal, SPAN_SCALE)
        # One matmul makes the scales and gates of all blocks and of the output norm.
        self.modulation = nn.Linear(signal, (4 * config.depth + 1) * width)
        self.blocks = nn.ModuleList(NextDiTBlock(config) for _ in range(config.depth))
        self.output_norm = nn.LayerNorm(width, 1e-6, elementwise_affine=False)
        self.output = nn.Linear(width, shape.target.width)
        self.init_weights()

    def initial_rules(self) -> Rules:
        rules: Rules = {"modulation.weight": 0.0, "output.weight": 0.0}
        return rules | {f"blocks.{i}.cross_gate": 0.0 for i in range(len(self.blocks))}

    def encode(self, condition: AnyCondition) -> EncodedCondition:
        if isinstance(condition, Condition):
            (words_BLW, pooled_BT), grid_BMW = self.words(condition), None
            if condition.grid is not None:
                grid_BMW, pooled_grid_BT = self._projected(condition.grid)
                pooled_BT = pooled_BT + pooled_grid_BT
            return self.attended(condition, grid_BMW, words_BLW, pooled_BT)
        tokens_BMW, pooled_BT = self._projected(condition)
        pairs = tuple(block.keys_values(tokens_BMW, self.rope_condition) for block in self.blocks)  # type: ignore[operator]
        return EncodedCondition(None, pooled_BT, pairs)

    def _projected(self, condition_BMC: Tensor) -> tuple[Tensor, Tensor]:
        hidden_BMW = self.caption_first(condition_BMC.to(self.caption_first.weight.dtype))
        tokens_BMW = self.caption_second(F.gelu(hidden_BMW, approximate="tanh"))
        return tokens_BMW, self.pool(self.pool_norm(tokens_BMW.mean(1)))

    def forward(
        self,
        x_BND: Tensor,
        t_B: Tensor,
        condition: AnyCondition | EncodedCondition,
        s_B: Tensor | None = None,
    ) -> Tensor:
        encoded = self.encoded(condition)
        x_BNW = self.input(x_BND.to(self.input.weight.dtype))
        # The time that the released weights count, from data to noise: a map's span is negative.
        reversed_s_B = None if s_B is None else 1 - s_B.float()
        times_BT = self.embedded_times(1 - t_B.float(), reversed_s_B)
        signal_B1T = (times_BT + encoded.pooled)[:, None]
        rows_B1RW = self.modulation(F.silu(signal_B1T)).to(x_BNW.dtype)
        rows_B1RW = rows_B1RW.unflatten(-1, (-1, self.config.width))
        by_block, last_B1W = rows_B1RW[:, :, :-1].split(4, 2), rows_B1RW[:, :, -1]
        x_BNW = self.run_blocks(x_BNW, by_block, encoded)
        x_BNW = self.output_norm(x_BNW) * (1 + last_B1W)
        return self.output(x_BNW).to(x_BND.dtype)

    def load_official(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights of an official BLIP3-o DiT (or diffusers' Lumina-Next) state dict.

        Where there are words, its caption projection is theirs; the null token stays as it is.

        Raises:
            UserError: If a tensor is missing or has another shape.
        """
        translated = from_official(state, self.config, self._reads_words_alone())
        own = self.state_dict()
        for name, tensor in translated.items():
            if tensor.shape != own[name].shape:
                raise UserError(
                    f"official weights make {name} {tuple(tensor.shape)}, model= has "
                    f"{tuple(own[name].shape)}; set model.width, model.heads, model.kv_heads or "
                    "model.ffn_dim_multiplier (1: FFN 4864, 1.5: 7168) to fit"
                )
        kept = {name: own[name] for name in own if name.startswith(("span.", "null_token"))}
        self.load_state_dict(kept | translated)

    def official_state(self) -> dict[str, Tensor]:
        """Return the weights under the official names and in the official layout."""
        return to_official(self.state_dict(), self.config, self._reads_words_alone())

    def _reads_words_alone(self) -> bool:
        words = self.shape.words is not None
        if words and self.shape.condition is not None:
            raise UserError("official weights read one condition: this one is a grid and words")
        return words
