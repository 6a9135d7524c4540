"""Trainer, precision and strategy groups: how long, on what and in which number format."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, one_of, positive

PRECISIONS = ("fp32", "tf32", "bf16", "bf16_true", "fp16")
STRATEGIES = ("auto", "single", "ddp", "fsdp2")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")


@dataclass
class TrainerConfig:
    """Length of the run and the devices it uses."""

    max_steps: int = 1000
    """Optimizer steps."""
    max_epochs: int | None = None
    """Passes over the training images; set, it replaces max_steps."""
    accelerator: str = "auto"
    """auto, cpu, gpu (cuda) or mps."""
    devices: str = "auto"
    """Devices (processes) a node: auto or a number."""
    num_nodes: int = 1
    """Nodes."""
    log_every: int = 10
    """Steps between two logged rows."""
    max_bad_steps: int = 10
    """Steps in a row with gradients that are not finite, all skipped, before the run stops."""

    def __post_init__(self) -> None:
        """Check each value."""
        one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        for key in ("max_steps", "max_epochs", "num_nodes", "log_every", "max_bad_steps"):
            positive(f"trainer.{key}", getattr(self, key))
        if self.devices != "auto" and not (self.devices.isdigit() and int(self.devices) > 0):
            raise UserError(f"trainer.devices={self.devices} must be auto or a number from 1 on")


@dataclass
class PrecisionConfig:
    """Number format of the forward and backward pass."""

    name: str = "bf16"
    """fp32, tf32 (GPU), bf16 (mixed, fp32 weights), bf16_true (bf16 weights) or fp16 (GPU)."""

    def __post_init__(self) -> None:
        """Check the name."""
        one_of("precision.name", self.name, PRECISIONS)


@dataclass
class StrategyConfig:
    """How the work is spread over processes."""

    name: str = "auto"
    """auto (single, or ddp with several devices), single, ddp or fsdp2."""
    consolidated: bool = False
    """fsdp2: each checkpoint is one file, gathered on rank 0; false: a folder, written by all."""
    timeout: float = 600.0
    """Seconds that a rank waits for the others before the run ends."""

    def __post_init__(self) -> None:
        """Check the name."""
        one_of("strategy.name", self.name, STRATEGIES)
        positive("strategy.timeout", self.timeout)
