"""Optimizer group: AdamW or Muon, the schedule and the weight average."""

from dataclasses import dataclass, field

from blip3o_lit.config.checks import above_zero, between, check_fields, choice, not_negative
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.rate import AUTO, peak_rate

MUON_LAYERS = ("blocks", "tokens")
WIDTHS = (0.005, 0.28)
"""Of power-function averages: the standard deviation of the steps over the run's length."""


@dataclass
class OptimizerConfig:
    """The optimizer, its learning-rate schedule, gradient clipping and EMA."""

    name: str = choice("adamw", ("adamw", "muon"))
    """adamw, or muon: Muon on matrices, by muon_layers, AdamW on the rest."""
    lr: int | float | str = 1e-3
    """Peak learning rate; auto: what short runs of a network of this width were best at."""
    auto_lr: float | None = above_zero(None)
    """Written by lr=auto: the number that it stands for in this run, which a resumption keeps."""
    beta1: float = between(0.9, 0.0, 1.0)
    """Decay of the first moment."""
    beta2: float = between(0.95, 0.0, 1.0)
    """Decay of the second moment."""
    momentum: float = between(0.95, 0.0, 1.0)
    """Muon's momentum."""
    muon_layers: str = choice("blocks", MUON_LAYERS)
    """Linear layers whose matrices Muon steps: blocks, those of the blocks; tokens, all but those
    of the time embedding and the modulation, as optimizer=muon has it."""
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

    ema_profiles: list[float] = field(default_factory=list)
    """Widths of further averages that are kept, as [0.05,0.1] of the run's length, so that
    `evaluate ema=[0.07,0.15]` and `export ema=best` choose another one after training; []: none."""
    ema_snapshots: int = above_zero(16)
    """Times that those are stored over the run, in `averages/` of its folder."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        self.lr = peak_rate(self.lr)
        if self.auto_lr is not None and self.lr != AUTO:
            raise UserError(
                f"optimizer.auto_lr={self.auto_lr:g} is what optimizer.lr=auto stands for, and "
                f"optimizer.lr is {self.lr}: give optimizer.lr alone"
            )
        for width in self.ema_profiles:
            check_width("optimizer.ema_profiles", width)
        if len(set(self.ema_profiles)) < len(self.ema_profiles):
            raise UserError(f"optimizer.ema_profiles={self.ema_profiles} names a width twice")

    @property
    def peak(self) -> float:
        """The number that `lr` is or stands for; a config of a whole run has it."""
        peak = self.auto_lr if self.lr == AUTO else self.lr
        assert isinstance(peak, float), "lr=auto of a network that isn't known yet"
        return peak


def check_width(key: str, width: float) -> None:
    """Refuse a width that no average over a run's steps has."""
    if not WIDTHS[0] <= width <= WIDTHS[1]:
        raise UserError(
            f"{key}: {width:g} is no width of an average: give a share of the run from "
            f"{WIDTHS[0]:g} to {WIDTHS[1]:g}, as 0.1"
        )
