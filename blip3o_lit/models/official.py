"""Names and layouts of the official BLIP3-o (diffusers' Lumina-Next) weights, both ways.

Our layout fuses matrices that read the same input, keeps each rotary pair at channels i and
i + K/2 of a head (theirs: neighbours, rows and columns in turn), and predicts data - noise.

Shape suffixes: K head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig

ANCHOR = "patch_embedder.proj.weight"
"""A name that every official state dict has, after its prefix."""


@dataclass(frozen=True)
class Part:
    """One official tensor: a run of rows of one of ours."""

    name: str
    rows: int = 0
    """Rows that it takes; 0: all."""
    rotary: bool = False
    """Whether its rows are rotary channels, head by head."""
    sign: float = 1.0


def parts(config: ModelConfig, words: bool = False) -> Iterator[tuple[str, list[Part]]]:
    """Yield each of our parameters with the official tensors that make it up, in row order.

    The official captions are a grid's tokens here, or words.
    """
    first, second, norm, pool = "caption_first", "caption_second", "pool_norm", "pool"
    if words:
        first, second, norm, pool = "words.first", "words.second", "words.norm", "words.pool"
    width, narrow = config.width, config.width // config.heads * config.kv_heads
    pairs = {
        "input": "patch_embedder.proj",
        first: "caption_projection.linear_1",
        second: "caption_projection.linear_2",
        "time.first": "time_caption_embed.timestep_embedder.linear_1",
        "time.second": "time_caption_embed.timestep_embedder.linear_2",
        norm: "time_caption_embed.caption_embedder.0",
        pool: "time_caption_embed.caption_embedder.1",
    }
    for kind in ("weight", "bias"):
        for ours, theirs in pairs.items():
            yield f"{ours}.{kind}", [Part(f"{theirs}.{kind}")]
        yield f"output.{kind}", [Part(f"norm_out.linear_2.{kind}", sign=-1.0)]
        rows = [Part(f"layers.{i}.norm1.linear.{kind}", 4 * width) for i in range(config.depth)]
        yield f"modulation.{kind}", [*rows, Part(f"norm_out.linear_1.{kind}", width)]
    for index in range(config.depth):
        for ours, group in _block(width, narrow, config.mlp_width).items():
            named = [Part(f"layers.{index}.{p.name}", p.rows, p.rotary, p.sign) for p in group]
            yield f"blocks.{index}.{ours}", named


def _block(width: int, narrow: int, hidden: int) -> dict[str, list[Part]]:
    table = {
        "cross_gate": [Part("gate")],
        "projection.weight": [
            Part("attn1.to_q.weight", width, rotary=True),
            Part("attn1.to_k.weight", narrow, rotary=True),
            Part("attn1.to_v.weight", narrow),
            Part("attn2.to_q.weight", width, rotary=True),
        ],
        "key_value.weight": [
            Part("attn2.to_k.weight", narrow, rotary=True),
            Part("attn2.to_v.weight", narrow),
        ],
        "out.weight": [Part("attn2.to_out.0.weight")],
        "mlp.gate_up.weight": [
            Part("feed_forward.linear_1.weight", hidden),
            Part("feed_forward.linear_3.weight", hidden),
        ],
        "mlp.down.weight": [Part("feed_forward.linear_2.weight")],
        "norm.weight": [Part("norm1.norm.weight")],
        "condition_norm.weight": [Part("norm1_context.weight")],
        "after_attention.weight": [Part("norm2.weight")],
        "mlp_norm.weight": [Part("ffn_norm1.weight")],
        "after_mlp.weight": [Part("ffn_norm2.weight")],
    }
    norms = {
        "query_norm": "attn1.norm_q",
        "key_norm": "attn1.norm_k",
        "cross_query_norm": "attn2.norm_q",
        "cross_key_norm": "attn2.norm_k",
    }
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = [Part(f"{theirs}.{kind}", rotary=True)]
    return table


def rotary_order(head_width: int) -> Tensor:
    """For each of our channels of a head, the official channel: int64 [K].

    Our pair i < K/4 is row frequency i, pair K/4 + j is column frequency j; the official pair
    2 j + axis sits at channels 2 (2 j + axis) and the next.
    """
    ours = torch.arange(head_width)
    pair, imaginary = ours % (head_width // 2), ours // (head_width // 2)
    axis, frequency = pair // (head_width // 4), pair % (head_width // 4)
    return 2 * (2 * frequency + axis) + imaginary


def _reorder(tensor: Tensor, order_K: Tensor) -> Tensor:
    heads = tensor.unflatten(0, (-1, len(order_K)))
    return heads[:, order_K.to(tensor.device)].flatten(0, 1)


def from_official(
    state: Mapping[str, Tensor], config: ModelConfig, words: bool = False
) -> dict[str, Tensor]:
    """Translate official weights, under any prefix and among others, to a NextDiT state dict.

    Raises:
        UserError: If there are no such weights or one of them is missing.
    """
    prefix = next((key.removesuffix(ANCHOR) for key in state if key.endswith(ANCHOR)), None)
    if prefix is None:
        raise UserError(f"not a BLIP3-o DiT state dict: no tensor is named ...{ANCHOR}")
    order_K = rotary_order(config.width // config.heads)
    result = {}
    for ours, group in parts(config, words):
        pieces = []
        for part in group:
            tensor = state.get(prefix + part.name)
            if tensor is None:
                raise UserError(
                    f"official weights lack {prefix}{part.name}; check model.depth={config.depth}"
                )
            pieces.append(part.sign * (_reorder(tensor, order_K) if part.rotary else tensor))
        result[ours] = torch.cat(pieces)
    return result


def to_official(
    state: Mapping[str, Tensor], config: ModelConfig, words: bool = False
) -> dict[str, Tensor]:
    """Translate a NextDiT state dict to the official names and layout."""
    order_K = rotary_order(config.width // config.heads).argsort()
    result = {}
    for ours, group in parts(config, words):
        tensor = state[ours]
        pieces = tensor.split([part.rows or len(tensor) for part in group])
        for part, piece in zip(group, pieces):
            piece = _reorder(piece, order_K) if part.rotary else piece
            result[part.name] = (part.sign * piece).contiguous()
    return result
