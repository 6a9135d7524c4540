"""Shapes of the tokens that a network translates; they always come from a token index."""

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
class SequenceShape:
    """A condition of words: token states of captions, each as many as its caption has."""

    longest: int
    """Tokens of the longest caption."""
    width: int
    """Channels of a token."""


@dataclass(frozen=True)
class PairShape:
    """Condition and target of one translation task; the condition is a grid, words or both."""

    condition: TokenShape | None
    """The condition's grid."""
    target: TokenShape
    words: SequenceShape | None = None

    @property
    def grid(self) -> TokenShape:
        """The condition's grid, for what knows no words.

        Raises:
            UserError: If the condition has words.
        """
        if self.condition is None or self.words is not None:
            raise UserError("the condition has words, and this takes a grid of tokens alone")
        return self.condition

    def fits(self, other: PairShape) -> bool:
        """Whether tokens of one shape go into a network of the other: captions have any length."""
        one, two = self.words, other.words
        widths = [None if words is None else words.width for words in (one, two)]
        sides = (self.condition, self.target, widths[0])
        return sides == (other.condition, other.target, widths[1])

    @property
    def condition_text(self) -> str:
        """The condition's sizes, as messages have them."""
        grid, words = self.condition, self.words
        parts = [] if grid is None else [f"{grid.tokens} x {grid.width}"]
        parts += [] if words is None else [f"up to {words.longest} words x {words.width}"]
        return " and ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts and lists, for checkpoints and exported configs."""
        sides = asdict(self)
        return {side: shape for side, shape in sides.items() if side != "words" or shape}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PairShape:
        """Rebuild from `to_dict`; anything but sides of a plausible size is refused."""
        words = None if data.get("words") is None else _words(data["words"])
        alone = words is not None and data.get("condition") is None
        condition = None if alone else _side(data, "condition")
        return cls(condition, _side(data, "target"), words)


def _words(data: Any) -> SequenceShape:
    damage = UserError(f"shape.words is damaged: {data!r:.100}")
    try:
        longest, width = data["longest"], data["width"]
    except (KeyError, TypeError) as error:
        raise damage from error
    if not all(type(size) is int and 0 < size <= LARGEST for size in (longest, width)):
        raise damage
    return SequenceShape(longest, width)


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
