"""The `ambiguous` testbed: several right targets for one condition."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip3o_lit.config.errors import UserError, positive, within


@dataclass
class AmbiguousConfig:
    """A mixture with known modes and weights: a regressor lands between them, a flow must not."""

    images: int = 16384
    """Training images; the validation split holds a further `validation_images`."""
    validation_images: int = 2048
    """Validation images."""
    grid: int = 4
    """Side of the square token grid."""
    condition_width: int = 16
    """Channels of a condition token."""
    target_width: int = 8
    """Channels of a target token; at least as many as there are modes."""
    weights: list[float] = field(default_factory=lambda: [0.5, 0.3, 0.2])
    """Probability of each mode; they add up to 1. An image's tokens share its mode."""
    separation: float = 6.0
    """Distance between two modes in a token, in standard deviations of what surrounds them."""
    explained: float = 0.7
    """Share of the variance within a mode that the condition explains, between 0 and 1."""
    seed: int = 0
    """Seed of the problem itself (map, modes, samples)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("images", "validation_images", "grid", "condition_width", "target_width"):
            positive(f"data.ambiguous.{key}", getattr(self, key))
        positive("data.ambiguous.separation", self.separation)
        within("data.ambiguous.explained", self.explained, 0.01, 0.99)
        total = sum(self.weights)
        if min(self.weights, default=0) <= 0 or abs(total - 1) > 1e-6:
            raise UserError(
                f"data.ambiguous.weights={self.weights} must be positive and add up to 1"
            )
        if len(self.weights) > self.target_width:
            raise UserError(
                f"data.ambiguous.target_width={self.target_width} is below the number of modes, "
                f"{len(self.weights)}"
            )
