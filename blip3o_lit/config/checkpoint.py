"""Checkpoint group: what is saved, how often and how much of it is kept."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, positive


@dataclass
class CheckpointConfig:
    """Checkpoints of a run; best.ckpt and last.ckpt are always kept."""

    every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 1
    """Step checkpoints to keep beside best and last; -1 keeps all."""

    def __post_init__(self) -> None:
        """Check each value."""
        positive("checkpoint.every", self.every)
        if self.keep < -1:
            raise UserError(f"checkpoint.keep={self.keep} must be -1 (all) or a number from 0 on")
