"""Shapes of the token grids that a network translates; they always come from a token index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TokenShape:
    """One side of a pair: a grid of patch tokens, with or without a CLS token before it."""

    grid: tuple[int, int]
    """Rows and columns of the patch grid."""
    cls: bool
    """Whether token 0 is the CLS token."""
    width: int
    """Channels of a token."""

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens, CLS included."""
        return self.patches + int(self.cls)


@dataclass(frozen=True)
class PairShape:
    """Condition and target of one translation task."""

    condition: TokenShape
    target: TokenShape

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, for checkpoints and exported configs."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PairShape:
        """Rebuild from `to_dict`."""
        sides = (
            TokenShape(tuple(data[side]["grid"]), data[side]["cls"], data[side]["width"])
            for side in ("condition", "target")
        )
        return cls(*sides)
