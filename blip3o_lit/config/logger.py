"""Logger group: where metrics go beside metrics.csv, which is always written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LoggerConfig:
    """Loggers; `logger=[tensorboard,wandb]` turns on several."""

    tensorboard: bool = False
    """Write TensorBoard event files into the run directory."""
    wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "blip3o_lit"
    """Project at Weights & Biases."""
    wandb_name: str | None = None
    """Run name at Weights & Biases."""
    wandb_offline: bool = False
    """Write the W&B run to disk only; WANDB_MODE=offline does the same."""
