"""Optimizer group: AdamW or Muon, the schedule and the weight average."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, one_of, positive, within

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant")


@dataclass
class OptimizerConfig:
    """The optimizer, its learning-rate schedule, gradient clipping and EMA."""

    name: str = "adamw"
    """adamw, or muon: Muon on the matrices of the blocks, AdamW on the rest."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    momentum: float = 0.95
    """Muon's momentum."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    schedule: str = "cosine"
    """Decay after the warm-up: cosine, linear or constant."""
    warmup_steps: int = 50
    """Steps of linear warm-up; at most a tenth of the run is used."""
    final_lr_fraction: float = 0.05
    """Learning rate at the end, as a fraction of the peak."""
    clip_norm: float = 1.0
    """Gradient norm above which gradients are scaled down."""
    ema_decay: float = 0.999
    """Decay of the fp32 weight average, ramped up as (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        """Check each value."""
        one_of("optimizer.name", self.name, OPTIMIZERS)
        one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for key in ("lr", "clip_norm"):
            positive(f"optimizer.{key}", getattr(self, key))
        for key in ("beta1", "beta2", "momentum", "final_lr_fraction", "ema_decay"):
            within(f"optimizer.{key}", getattr(self, key), 0.0, 1.0)
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise UserError(
                "optimizer.warmup_steps and optimizer.weight_decay must not be negative"
            )
