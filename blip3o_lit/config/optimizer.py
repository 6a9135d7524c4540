"""Optimizer group: AdamW or Muon, the schedule and the weight average."""

from dataclasses import dataclass

from blip3o_lit.config.checks import above_zero, between, check_fields, choice, not_negative


@dataclass
class OptimizerConfig:
    """The optimizer, its learning-rate schedule, gradient clipping and EMA."""

    name: str = choice("adamw", ("adamw", "muon"))
    """adamw, or muon: Muon on the matrices of the blocks, AdamW on the rest."""
    lr: float = above_zero(1e-3)
    """Peak learning rate."""
    beta1: float = between(0.9, 0.0, 1.0)
    """Decay of the first moment."""
    beta2: float = between(0.95, 0.0, 1.0)
    """Decay of the second moment."""
    momentum: float = between(0.95, 0.0, 1.0)
    """Muon's momentum."""
    weight_decay: float = not_negative(0.01)
    """Decoupled weight decay, on matrices only."""
    schedule: str = choice("cosine", ("cosine", "linear", "constant"))
    """Decay after the warm-up: cosine, linear or constant."""
    warmup_steps: int = not_negative(50)
    """Steps of linear warm-up; at most a tenth of the run is used."""
    final_lr_fraction: float = between(0.05, 0.0, 1.0)
    """Learning rate at the end, as a fraction of the peak."""
    clip_norm: float = above_zero(1.0)
    """Gradient norm above which gradients are scaled down."""
    ema_decay: float = between(0.999, 0.0, 1.0)
    """Decay of the fp32 weight average, ramped up as (1 + step) / (10 + step)."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
