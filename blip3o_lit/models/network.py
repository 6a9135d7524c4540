"""What the two transformers share: the encoded condition, rotary tables, how blocks are run.

Shape suffixes: B batch, N target tokens, D target width, M condition tokens, C condition width,
W network width, G key and value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blip3o_lit.base.condition import AnyCondition, Condition, empty_condition
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.initialisation import Rules, apply_rules, narrow_normal, rules_of_layers
from blip3o_lit.models.layers import TimeEmbedding, rope_table
from blip3o_lit.models.recomputation import recomputed
from blip3o_lit.models.words import joined, key_mask, key_rope

KeysValues = tuple[Tensor, ...]
"""Keys and values of one cross-attention, each [B, M, G, K]; as a block gets them with words, the
mask too."""


class EncodedCondition(NamedTuple):
    """What the network needs of a condition; computed once per sample, reused at every step."""

    tokens: Tensor | None
    """conditioning=aligned: projected condition in the target's token order, [B, N, W]."""
    pooled: Tensor
    """Mean condition token, projected; joins the time embedding, [B, width of that]."""
    keys_values: tuple[KeysValues, ...] | None
    """conditioning=cross: keys and values of each block."""
    mask: Tensor | None = None
    """With words: which keys are read, bool [B, 1, 1, keys]; the same in each block."""


SPAN_SCALE = 10.0
"""Of the embedding of s - t: a map to s learns from shorter ones, so it has to change slowly."""


class Network(nn.Module):
    """A transformer from (x_t, t, condition) to its raw output; `DiT` and `NextDiT` are the two.

    Condition, target and x_t are standardised tokens. With model.second_time the output is that of
    the map from t to s. The embedding of s - t starts at zero, so that its network starts out as
    one without it.
    """

    blocks: nn.ModuleList
    time: TimeEmbedding
    span: TimeEmbedding | None
    rope: Tensor | None
    rope_condition: Tensor | None
    rope_base = 100.0
    reads_words = False
    """Whether a condition may hold words; a package's own network says so itself."""
    compiled = False
    """Whether blocks run through torch.compile."""

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        super().__init__()
        self.config, self.shape = config, shape
        if shape.words is not None and not self.reads_words:
            raise UserError(f"model.architecture={config.architecture} reads grids, and no words")
        if shape.words is not None and config.conditioning == "aligned":
            raise UserError(
                "model.conditioning=aligned adds each condition token at its place, and words "
                "have none in a grid: use model.conditioning=cross"
            )
        self.span = None
        self.null_token: nn.Parameter | None = None
        if shape.words is not None:
            self.null_token = nn.Parameter(torch.empty(config.width))
        for name, table in self._rope_tables().items():
            self.register_buffer(name, table, persistent=False)

    def _rope_tables(self) -> dict[str, Tensor | None]:
        """Compute the tables by buffer name; the condition's grid is laid over the target's."""
        config, source, target = self.config, self.shape.condition, self.shape.target
        head_width = config.width // config.heads
        rotary = config.positions in ("rope", "both")
        tables: dict[str, Tensor | None] = {"rope": None, "rope_condition": None}
        if rotary:
            tables["rope"] = rope_table(target, head_width, target.grid, self.rope_base)
        if rotary and source is not None and config.conditioning == "cross" and config.key_rope:
            tables["rope_condition"] = rope_table(source, head_width, target.grid, self.rope_base)
        return tables

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter and buffer; call again after materialising from the meta device.

        Args:
            seed: Each parameter is a function of it and of its own name, so that every layout of
                the weights over processes starts alike; None draws one from torch's generator.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        rules: Rules = dict.fromkeys(("time.first.weight", "time.second.weight"), narrow_normal)
        rules["null_token"] = narrow_normal
        rules |= {"span.first.weight": narrow_normal, "span.second.weight": 0.0}
        apply_rules(self, rules_of_layers(self) | rules | self.initial_rules(), seed)
        self.fill_buffers()

    def initial_rules(self) -> Rules:
        """Return the start values that differ from those of `rules_of_layers`."""
        raise NotImplementedError

    def fill_buffers(self) -> None:
        """Compute the buffers, which no checkpoint has."""
        for name, table in self._rope_tables().items():
            if table is not None:
                self.get_buffer(name).copy_(table)

    def encode(self, condition: AnyCondition) -> EncodedCondition:
        """Project a condition once, for any number of forward calls."""
        raise NotImplementedError

    def encoded(self, condition: AnyCondition | EncodedCondition) -> EncodedCondition:
        """Return the condition encoded; for use inside `forward`.

        Not through `self.encode`, which a sharded network replaces by one that gathers the weights
        and frees them again: forward has gathered them.
        """
        if isinstance(condition, EncodedCondition):
            return condition
        return type(self).encode(self, condition)

    def attended(
        self,
        condition: Condition,
        grid_BMW: Tensor | None,
        words_BLW: Tensor,
        pooled: Tensor,
    ) -> EncodedCondition:
        """Return what `encode` does of projected words, and a projected grid beside them."""
        assert self.null_token is not None
        words = words_BLW.shape[1]
        tokens_BTW = joined(self.null_token, grid_BMW, words_BLW)
        rope = key_rope(self.rope_condition, words)
        pairs = tuple(block.keys_values(tokens_BTW, rope) for block in self.blocks)  # type: ignore[operator]
        mask = key_mask(condition.length, words, tokens_BTW.shape[1])
        if self.compiled:  # one graph for captions of any length
            for key_BTGK, value_BTGK in pairs:
                torch._dynamo.maybe_mark_dynamic(key_BTGK, 1)
                torch._dynamo.maybe_mark_dynamic(value_BTGK, 1)
            torch._dynamo.maybe_mark_dynamic(mask, 3)
        return EncodedCondition(None, pooled, pairs, mask)

    def forward(
        self,
        x_BND: Tensor,
        t_B: Tensor,
        condition: AnyCondition | EncodedCondition,
        s_B: Tensor | None = None,
    ) -> Tensor:
        """Return the raw output [B, N, D], in the dtype of `x_BND`.

        Args:
            x_BND: Noisy target tokens x_t.
            t_B: Times in [0, 1], 0 is noise.
            condition: Condition tokens [B, M, C], words, or what `encode` made of them.
            s_B: Times that the map ends at, with model.second_time; None: t, the flow's estimate.
        """
        raise NotImplementedError

    def embedded_times(self, t_B: Tensor, s_B: Tensor | None) -> Tensor:
        """Embed [B] times, and how far the map goes, to [B, width of the embedding]."""
        signal = self.time(t_B)
        if self.span is None:
            assert s_B is None, "the network has no second time"
            return signal
        return signal + self.span(torch.zeros_like(t_B) if s_B is None else s_B - t_B)

    def run_blocks(
        self, x_BNW: Tensor, modulation: Sequence[Tensor | None], encoded: EncodedCondition
    ) -> Tensor:
        """Apply the blocks in turn, each with its own modulation, keys and values."""
        budget = self.config.kept_activations
        if self.compiled and budget:  # the compiler has been told
            budget = 1.0
        rope = None if self.rope is None else self.rope.to(x_BNW.dtype)
        keys_values = encoded.keys_values or [None] * len(self.blocks)
        for block, rows, pair in zip(self.blocks, modulation, keys_values):
            if pair is not None and encoded.mask is not None:
                pair = (*pair, encoded.mask)
            if budget < 1 and torch.is_grad_enabled():
                x_BNW = recomputed(block, budget, x_BNW, rows, rope, pair)
            else:
                x_BNW = block(x_BNW, rows, rope, pair)
        return x_BNW

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block in place; names in the state dict stay as they are.

        Before a network is sharded: the gathering of weights stays outside the graph.
        """
        import torch._dynamo  # seconds
        import torch._functorch.config

        # Graphs are not cut at DDP's buckets: a block is a small part of the network.
        torch._dynamo.config.optimize_ddp = False
        budget = self.config.kept_activations or 1.0
        if torch._functorch.config.activation_memory_budget != budget:
            torch._dynamo.reset()  # graphs of an earlier network keep what that one was to keep
            torch._functorch.config.activation_memory_budget = budget
        self.compiled = True
        options = {"combo_kernels": True} if self.config.compile == "combined" else None
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True, options=options)

    def forward_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of a forward call with an unencoded condition; training costs 3 times it.

        Captions are taken to be as long as the longest.
        """
        one, two = self._count_flops(1, batch), self._count_flops(2, batch)
        return one + (self.config.depth - 1) * (two - one)

    @torch.no_grad()
    def _count_flops(self, depth: int, batch: int) -> int:
        from torch.utils.flop_counter import FlopCounterMode  # slow to import

        target = self.shape.target
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            network = type(self)(replace(self.config, depth=depth), self.shape)
            x_BND = torch.empty(batch, target.tokens, target.width)
            condition = empty_condition(self.shape, batch)
            with FlopCounterMode(display=False) as counter:
                network(x_BND, torch.empty(batch), condition)
        return counter.get_total_flops()
