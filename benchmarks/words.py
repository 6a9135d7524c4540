"""What batches of captions of like length would save: each padded to its own longest, or sorted.

A batch is padded to its own longest caption. Beside that stand the same captions sorted by length
before they are cut into batches, the most that any bucketing reaches, and all at the full length.
The demo's sizes are timed in CPU seconds; those of `experiment=text` are counted, by the network's
own FLOPs, for two spreads of lengths: even from 8 to CLIP's 77 tokens, and short captions of 8 to
30.

Shape suffixes: I captions, B images of a batch, E width of words.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import interleaved, result
from benchmarks.training import model_config
from blip3o_lit.base.condition import Condition
from blip3o_lit.base.shape import PairShape, SequenceShape, TokenShape
from blip3o_lit.budget.states import units
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.towers import TextTowerConfig
from blip3o_lit.models.network_of import build_network
from blip3o_lit.tokens.scales import padded
from blip3o_lit.towers import scenes
from blip3o_lit.towers.text_tower import load_text_tower

DEMO = {"width": 192, "depth": 4, "heads": 4, "kv_heads": 2, "mlp_width": 512}
"""As `experiment=demo_text` sets them."""
DEMO_SHAPE = TokenShape((16, 16), False, 128)
SCENES, BATCH, TIMED, STEPS, ROUNDS = 512, 16, 4, 4, 3
"""Scenes of the demo, images of a batch, those of them that steps are timed with, steps, rounds."""
REAL = TokenShape((16, 16), False, 1024)
REAL_WORDS, REAL_BATCH, REAL_CAPTIONS = SequenceShape(77, 768), 64, 16_384
"""Of CLIP ViT-L/14; a batch is what one of eight devices has of 512."""
WORTH = 1.05
"""Bucketing is worth its code from this on: steps of plain batches over those of sorted ones."""


def by_case(length_I: Tensor, batch: int, longest: int) -> dict[str, list[Tensor]]:
    """Return the lengths of batches for each way to pad, full ones as if all were the longest."""
    return {
        "own longest": list(length_I.split(batch)),
        "sorted": list(length_I.sort().values.split(batch)),
        "full": [torch.full_like(part, longest) for part in length_I.split(batch)],
    }


def trainer(network: nn.Module, shape: PairShape, batches: Iterable[Tensor]) -> Callable[[], None]:
    """Return a function that takes a training step with each batch of captions."""
    network.train()
    assert shape.words is not None
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5, fused=True)
    conditions = [
        Condition(
            None, torch.randn(TIMED, padded(int(part.max())), shape.words.width), part[-TIMED:]
        )
        for part in batches
    ]
    x_BND, true_BND = torch.randn(2, TIMED, shape.target.tokens, shape.target.width)
    t_B = torch.rand(TIMED)

    def steps() -> None:
        for condition in conditions:
            (network(x_BND, t_B, condition) - true_BND).square().mean().backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def timed(name: str, config: ModelConfig) -> list[dict[str, Any]]:
    """Time steps on the demo's captions, in fp32."""
    tower = load_text_tower(TextTowerConfig("demo"))
    captions = [scenes.scene("train", number).caption for number in range(SCENES)]
    length_I = torch.tensor([len(states) for states in tower.states(captions)])
    longest = int(length_I.max())
    shape = PairShape(None, DEMO_SHAPE, SequenceShape(longest, tower.info.width))
    every = SCENES // BATCH // STEPS
    parts_of = by_case(length_I, BATCH, longest)
    cases = {case: parts[every // 2 :: every] for case, parts in parts_of.items()}
    network = build_network(config, shape)
    seconds = interleaved(
        {case: trainer(network, shape, parts) for case, parts in cases.items()},
        ROUNDS,
        clock=time.process_time,
    )
    for case, value in seconds.items():
        mean = sum(padded(int(part.max())) for part in cases[case]) / STEPS
        cost = 1e3 * value / STEPS
        print(f"  {name:<12} {case:<12} {cost:6.0f} CPU ms a step, {mean:4.0f} tokens")
    gain = seconds["own longest"] / seconds["sorted"]
    return [result(f"words/{name}_over_sorted", gain, "x", WORTH, "lower")]


def counted(name: str, config: ModelConfig) -> list[dict[str, Any]]:
    """Count the FLOPs of a step at real size."""
    random = torch.Generator().manual_seed(0)

    def flops(tokens: int) -> int:
        words = SequenceShape(tokens, REAL_WORDS.width)
        return units(config, PairShape(None, REAL, words)).forward_flops

    found = []
    for spread, most in (("8 to 77", 77), ("8 to 30", 30)):
        length_I = torch.randint(8, most + 1, (REAL_CAPTIONS,), generator=random)
        cases = by_case(length_I, REAL_BATCH, REAL_WORDS.longest)
        cost = {}
        for case, parts in cases.items():
            tokens = [padded(int(part.max())) for part in parts]
            cost[case] = sum(map(flops, tokens)) / len(tokens)
            mean = sum(tokens) / len(tokens)
            print(
                f"  {name:<12} {case:<12} {3 * cost[case] / 1e9:7.0f} GFLOP an image, "
                f"{mean:4.0f} tokens, captions of {spread}"
            )
        gain = cost["own longest"] / cost["sorted"]
        label = f"words/{name}_{spread.replace(' ', '_')}_flops_over_sorted"
        found.append(result(label, gain, "x", WORTH, "lower"))
    return found


def run() -> list[dict[str, Any]]:
    """Time the demo's DiT and NextDiT, count the real sizes."""
    demo = ModelConfig(**DEMO, conditioning="cross")
    nextdit = ModelConfig("nextdit", **DEMO, conditioning="cross", key_rope=False)
    return [
        *timed("demo_dit", demo),
        *timed("demo_nextdit", nextdit),
        *counted("base_dit", model_config("base", conditioning="cross")),
        *counted("nextdit", model_config("nextdit")),
    ]
