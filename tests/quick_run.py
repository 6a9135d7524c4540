"""A run of seconds, and what two of its checkpoints differ in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.config.data import DataConfig, LinearGaussianConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    LoggerConfig,
    PrecisionConfig,
    TrainerConfig,
)

PROBLEM = LinearGaussianConfig(images=72, validation_images=20, condition_width=6, target_width=4)


def config(**changes: Any) -> TrainConfig:
    """A run of 12 steps of 16 images over 72: epochs end in the middle of steps 5 and 9."""
    base = TrainConfig(
        model=ModelConfig(width=16, depth=2, heads=2, kv_heads=1, mlp_width=16),
        data=DataConfig(name="linear_gaussian", linear_gaussian=PROBLEM),
        precision=PrecisionConfig("fp32"),
        trainer=TrainerConfig(max_steps=12, log_every=1, accelerator="cpu"),
        evaluation=EvaluationConfig(every=4, images=20),
        checkpoint=CheckpointConfig(every=2, keep=-1),
        logger=LoggerConfig(tensorboard=False),
        batch_size=16,
        seed=7,
    )
    return replace(base, **changes)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Name the leaves in which two nested checkpoints differ."""
    if torch.is_tensor(a):
        return [] if torch.is_tensor(b) and torch.equal(a, b) else [place]
    if isinstance(a, dict):
        found = [f"{place}.{key}" for key in a.keys() ^ b.keys()]
        return found + [
            d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{place}.{k}")
        ]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [place]
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{place}[{i}]")]
    return [] if a == b else [place]


def state(path: Path) -> dict[str, Any]:
    loaded = checkpointing.load(path)
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "callbacks")
    kept = {key: loaded[key] for key in keys}
    kept["data"] = loaded["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return kept
