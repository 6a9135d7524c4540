"""What the two transformers share: the encoded condition and how a stack of blocks is run.

Shape suffixes: B batch, N target tokens, D target width, M condition tokens, C condition width,
W network width, G key and value heads, K head width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blip3o_lit.base.home import home
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.models.initialisation import Rules, apply_rules, rules_of_layers

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one cross-attention, each [B, M, G, K]."""


class EncodedCondition(NamedTuple):
    """What the network needs of a condition; computed once a sample, reused at every step."""

    tokens: Tensor | None
    """conditioning=aligned: projected condition in the target's token order, [B, N, W]."""
    pooled: Tensor
    """Mean condition token, projected; joins the time embedding, [B, width of that]."""
    keys_values: tuple[KeysValues, ...] | None
    """conditioning=cross: keys and values of each block."""


class Network(nn.Module):
    """A transformer from (x_t, t, condition) to its raw output; `DiT` and `NextDiT` are the two.

    Condition, target and x_t are standardised tokens.
    """

    blocks: nn.ModuleList

    def __init__(self, config: ModelConfig, shape: PairShape) -> None:
        """Keep the configuration and the shapes."""
        super().__init__()
        self.config, self.shape = config, shape

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Set every parameter and buffer; call again after materialising from the meta device.

        Args:
            seed: Each parameter is a function of it and of its own name, so that every layout of
                the weights over processes starts alike; None draws one from torch's generator.
        """
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        apply_rules(self, rules_of_layers(self) | self.start_rules(), seed)
        self.fill_buffers()

    def start_rules(self) -> Rules:
        """Return the start values that differ from those of `rules_of_layers`."""
        raise NotImplementedError

    def fill_buffers(self) -> None:
        """Compute the buffers."""
        raise NotImplementedError

    def encode(self, condition_BMC: Tensor) -> EncodedCondition:
        """Project a condition once, for any number of forward calls."""
        raise NotImplementedError

    def encoded(self, condition: Tensor | EncodedCondition) -> EncodedCondition:
        """Return the condition encoded; for use inside `forward`.

        Not through `self.encode`, which a sharded network replaces by one that gathers the weights
        and frees them again: forward has gathered them.
        """
        if isinstance(condition, EncodedCondition):
            return condition
        return type(self).encode(self, condition)

    def forward(self, x_BND: Tensor, t_B: Tensor, condition: Tensor | EncodedCondition) -> Tensor:
        """Evaluate the network.

        Args:
            x_BND: Noisy target tokens x_t.
            t_B: Times in [0, 1], 0 is noise.
            condition: Condition tokens [B, M, C], or what `encode` made of them.

        Returns:
            The raw output [B, N, D], in the dtype of `x_BND`.
        """
        raise NotImplementedError

    def encode_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of `encode`; a multiply-add counts 2."""
        raise NotImplementedError

    def forward_flops(self, batch: int = 1) -> int:
        """Matmul FLOPs of a forward call with an unencoded condition; training costs 3 times it."""
        raise NotImplementedError

    def run_blocks(self, x_BNW: Tensor, inputs: Iterable[tuple[Any, ...]]) -> Tensor:
        """Apply the blocks in turn, each with its own further inputs."""
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        for block, further in zip(self.blocks, inputs):
            if recompute:
                x_BNW = checkpoint(block, x_BNW, *further, use_reentrant=False)  # type: ignore[assignment]
            else:
                x_BNW = block(x_BNW, *further)
        return x_BNW

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile each block in place; names in the state dict stay as they are.

        The kernels are kept in the project's cache folder, where the next run finds them.
        """
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "kernels"))
        for block in self.blocks:
            block.compile(backend=backend, fullgraph=True)
