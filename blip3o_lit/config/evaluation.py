"""Validation during training: how often, on how many images, and when to stop early."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import positive


@dataclass
class EvaluationConfig:
    """Generation-based validation while training runs; the last step is always validated."""

    every: int = 500
    """Steps between two validations."""
    images: int = 64
    """Validation images to generate; the `evaluate` command uses the whole split."""
    patience: int | None = None
    """Stop after so many validations without a better cosine; null never stops."""
    overfit_at_least: float | None = None
    """Least cosine that generated tokens of the training images must reach at the end; the command
    exits with 1 below it."""

    def __post_init__(self) -> None:
        """Check each value."""
        for key in ("every", "images", "patience"):
            positive(f"evaluation.{key}", getattr(self, key))
