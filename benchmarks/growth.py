"""How time and memory of a step grow with batch, depth and tokens, beside arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.timing import interleaved, result
from benchmarks.training import model_config, saved_bytes, stepper
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.models.network_of import build_network


def run() -> list[dict[str, Any]]:
    """Return how far time and memory of a step are from what arithmetic says, `tiny` in bf16."""
    shapes = {n: TokenShape((n, n), False, 4096) for n in (8, 16, 32)}
    cases = {
        "3 deep, 8": (3, shapes[16], 8),
        "6 deep, 8": (6, shapes[16], 8),
        "6 deep, 16": (6, shapes[16], 16),
        "64 tokens": (6, shapes[8], 16),
        "257 tokens": (6, replace(shapes[16], cls=True), 8),
        "1024 tokens": (6, shapes[32], 4),
    }
    steps, flops, kept = {}, {}, {}
    for name, (depth, source, batch) in cases.items():
        pair = PairShape(source, replace(source, width=1024))
        network = build_network(model_config("tiny", depth=depth), pair)
        flops[name] = network.forward_flops(batch)
        kept[name] = saved_bytes(network, batch, source.tokens)
        steps[name] = stepper(network, batch, torch.bfloat16, source.tokens)
    seconds = interleaved(steps, rounds=7)
    for name, value in seconds.items():
        print(f"  {name:<12} {1e3 * value:7.0f} ms a step, {kept[name] / 2**20:6.0f} MiB kept")

    def grown(found: dict[str, Any], large: str, small: str) -> float:
        return found[large] / found[small]

    def over(large: str, small: str) -> float:
        return grown(seconds, large, small) / grown(flops, large, small)

    rows = (
        ("cost_by_batch_over_linear", over("6 deep, 16", "6 deep, 8"), 1.1),
        ("cost_by_depth_over_flops", over("6 deep, 8", "3 deep, 8"), 1.1),
        ("memory_by_batch_over_linear", grown(kept, "6 deep, 16", "6 deep, 8") / 2, 1.1),
        ("memory_by_depth_over_linear", grown(kept, "6 deep, 8", "3 deep, 8") / 2, 1.1),
        ("cost_of_256_over_64_tokens_over_flops", over("6 deep, 8", "64 tokens"), 1.2),
        ("cost_of_257_over_256_tokens_over_flops", over("257 tokens", "6 deep, 8"), 1.1),
        ("cost_of_1024_over_256_tokens_over_flops", over("1024 tokens", "6 deep, 8"), 1.2),
    )
    return [result(f"growth/{name}", value, "x", most, "lower") for name, value, most in rows]
