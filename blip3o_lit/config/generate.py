"""The schema of the generate command."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip3o_lit.config.errors import UserError, positive
from blip3o_lit.config.pixels import PixelsConfig
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.config.towers import TowersConfig


@dataclass
class GenerateConfig:
    """Which checkpoint makes which tokens."""

    ckpt: str = ""
    """A checkpoint file, a run directory, an exported folder or a hub id."""
    tokens: str = ""
    """Token store that holds the condition tokens."""
    out: str = ""
    """Folder for the generated store; a stopped command goes on where it was."""
    images: str | None = None
    """A picture, or a folder of them, in place of a token store: prints the best captions."""
    captions: str | None = None
    """Text file with a caption a line, ranked for each picture of `images`."""
    best: int = 3
    """Captions printed for each picture."""
    towers: TowersConfig = field(default_factory=TowersConfig)
    """Encoders of pictures (condition) and captions (target)."""
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    """How pictures become pixels: as in the extraction of the training tokens."""
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
        if not self.ckpt:
            raise UserError("ckpt=PATH is missing: name a checkpoint or a run directory")
        if bool(self.images) != bool(self.captions):
            raise UserError("images=PATH and captions=FILE belong together: give both")
        if not self.images and not (self.tokens and self.out):
            raise UserError("tokens=DIR and out=DIR are missing (or images=PATH captions=FILE)")
        if self.images and (self.tokens or self.out):
            raise UserError("images= prints captions, tokens= out= writes a store: give one pair")
        positive("batch_size", self.batch_size)
        positive("best", self.best)
