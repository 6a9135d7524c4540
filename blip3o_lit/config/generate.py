"""The schema of the generate command."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip3o_lit.config.errors import UserError, positive
from blip3o_lit.config.solver import SolverConfig


@dataclass
class GenerateConfig:
    """Which checkpoint makes which tokens."""

    ckpt: str = ""
    """A checkpoint file, a run directory, an exported folder or a hub id."""
    tokens: str = ""
    """Token store that holds the condition tokens."""
    out: str = ""
    """Folder for the generated store; a stopped command goes on where it was."""
    split: str | None = None
    """Split to translate; null: all of them."""
    solver: SolverConfig = field(default_factory=SolverConfig)
    """Estimator: mean, or an ODE solver that draws samples."""
    batch_size: int = 64
    """Images a forward pass."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """auto, cpu, cuda or mps."""

    def __post_init__(self) -> None:
        """Check each value."""
        for key in ("ckpt", "tokens", "out"):
            if not getattr(self, key):
                raise UserError(f"{key}=PATH is missing: generate needs ckpt=, tokens= and out=")
        positive("batch_size", self.batch_size)
