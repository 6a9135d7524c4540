"""Shapes of the token grids that a network translates; they always come from a token index."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from blip3o_lit.config.errors import UserError

LARGEST = 65_536
"""Largest side of a grid, or width of a token, that a file may claim."""


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
        """Rebuild from `to_dict`; anything but two grids of a plausible size is refused."""
        return cls(_side(data, "condition"), _side(data, "target"))


def _side(data: dict[str, Any], side: str) -> TokenShape:
    damage = UserError(f"shape.{side} is damaged: {data.get(side)!r:.100}")
    try:
        grid, has_cls, width = (data[side][key] for key in ("grid", "cls", "width"))
        rows, columns = grid
    except (KeyError, TypeError, ValueError) as error:
        raise damage from error
    for size in (rows, columns, width):
        if type(size) is not int or not 0 < size <= LARGEST:
            raise damage
    if not isinstance(has_cls, bool):
        raise damage
    return TokenShape((rows, columns), has_cls, width)
