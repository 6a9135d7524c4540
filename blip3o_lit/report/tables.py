"""Tables as plain cells: the text that is shown, and the key that a column sorts by."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from blip3o_lit.base.words import flatten
from blip3o_lit.report.record import finite
from blip3o_lit.report.scores import MISSING, significant


class Cell(NamedTuple):
    """A cell; an empty key sorts last, and numbers stand on the right."""

    text: str
    key: str
    number: bool


@dataclass
class Table:
    """Headings, and lines whose first cell names the line."""

    heads: list[str]
    lines: list[list[Cell]]

    def is_text(self, column: int) -> bool:
        """Whether a column holds words, which stand on the left."""
        return column == 0 or not all(line[column].number for line in self.lines)


def table(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> Table:
    return Table(list(heads), [[cell(value) for value in line] for line in lines])


def facts(values: dict[str, Any]) -> Table:
    return table(["Name", "Value"], [(key, _fact(value)) for key, value in flatten(values).items()])


def cell(value: object) -> Cell:
    number = finite(value)
    if number is not None:
        shown = f"{value:,}" if isinstance(value, int) else significant(number)
        return Cell(shown, repr(number), True)
    if value is None or value == MISSING:
        return Cell(MISSING, "", True)
    shown = str(value)
    return Cell(shown, shown.replace(",", ""), re.fullmatch(r"[-+.,e\d]+", shown) is not None)


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return MISSING if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
