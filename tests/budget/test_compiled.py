"""When blocks are compiled; `test_strategies.py` runs them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.budget.machine import imagined_machine, this_machine
from blip3o_lit.budget.placement import resolve
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import StrategyConfig

SHAPE = PairShape(TokenShape((4, 4), False, 8), TokenShape((4, 4), False, 8))


def test_auto_compiles_on_gpus_alone_and_every_strategy_can() -> None:
    gpus, cpu = imagined_machine("H100", 8), replace(this_machine("cpu"), processes=2, nodes=1)
    for strategy in ("ddp", "fsdp2"):
        for word, there in (
            ("auto", (True, False)),
            ("true", (True, True)),
            ("false", (False,) * 2),
        ):
            config = TrainConfig(
                model=ModelConfig(width=32, depth=1, heads=2, kv_heads=1, compile=word),
                strategy=StrategyConfig(strategy),
            )
            assert tuple(resolve(config, SHAPE, it).compiled for it in (gpus, cpu)) == there


def test_truth_values_are_words_too_and_others_are_refused() -> None:
    assert (ModelConfig(compile=True).compile, ModelConfig(compile=False).compile) == (  # type: ignore[arg-type]
        "true",
        "false",
    )
    with pytest.raises(UserError, match=r"model\.compile=maybe"):
        ModelConfig(compile="maybe")
