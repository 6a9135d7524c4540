"""Images that a CSV or JSONL file lists, with captions, splits and labels where it has them."""

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blip3o_lit.base.files import sha256_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.images.item import Item, Lost, file_bytes
from blip3o_lit.images.text import column, first_text, first_texts, label_of, read_text

TABLES = ("csv", "tsv", "jsonl")
PATHS = ("path", "image", "imagepath", "file", "filename", "filepath")
"""Columns of paths as `column` spells them: `Image Path` and `image_path` are `imagepath`."""
CAPTIONS = ("caption", "text", "prompt", "title")
SPLIT, LABEL = "split", "label"
DELIMITERS = ",;\t|"
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
"""Splits, and what they may be called."""

Row = dict[str, Any] | str
"""Cells by `column`, or the reason why there are none."""


def rows(table: Path) -> Iterator[tuple[int, Row]]:
    """Yield line numbers and rows; a row that can't be read comes as the reason."""
    text = read_text(table)
    if table.suffix.lower() != ".jsonl":
        yield from _csv_rows(table, text)
        return
    for number, line in enumerate(io.StringIO(text), start=1):
        if line.strip():
            yield number, _json_row(line)


def _csv_rows(table: Path, text: str) -> Iterator[tuple[int, Row]]:
    header = next((line for line in io.StringIO(text) if line.strip()), "")
    lines = csv.reader(
        io.StringIO(text), delimiter=_delimiter(header), skipinitialspace=True, strict=True
    )
    names: list[str] = []
    last = 0
    try:
        for cells in lines:
            last = lines.line_num
            if len(cells) < 2 and not "".join(cells).strip():
                continue
            if not names:
                names = [column(cell) for cell in cells]
                if twice := _twice(names):
                    raise UserError(f"{table} has two columns named {twice}: rename one")
            elif "".join(cells[len(names) :]).strip():
                reason = f"{len(cells)} cells, the header has {len(names)}: quote text with commas"
                yield last, reason
            else:
                yield last, {name: cell.strip() for name, cell in zip(names, cells)}
    except csv.Error as error:
        raise UserError(f"{table} line {last + 1}: {_csv_reason(error)}") from error


def _csv_reason(error: csv.Error) -> str:
    limit = csv.field_size_limit()
    if str(error) == f"field larger than field limit ({limit})":
        advice = "a quote may be left open, or the text must be shortened"
        return f"a cell of over {limit} characters: {advice}"
    if str(error) == "unexpected end of data":
        return "a quote is left open"
    return f"{error}: double the quotes inside quoted text"


def _delimiter(header: str) -> str:
    """Return the sign that makes a column of paths of the header, else a comma."""
    for sign in DELIMITERS:
        if any(column(name) in PATHS for name in header.split(sign)):
            return sign
    return ","


def _twice(names: list[str]) -> str:
    """Return a column that is read and that the names hold twice, or an empty string."""
    used = (*PATHS, *CAPTIONS, SPLIT, LABEL)
    return next((name for name in used if names.count(name) > 1), "")


def _json_row(line: str) -> Row:
    try:
        fields = json.loads(line, object_pairs_hook=tuple)  # a dict would drop repeated names
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(fields, tuple):
        return "no JSON object"
    if twice := _twice([column(name) for name, _ in fields]):
        return f"{twice} is there twice"
    return {column(name): value for name, value in fields}


def split_name(word: str, where: str) -> str:
    """Return a split's name as stores write it: `val` and `dev` mean validation."""
    for name, words in SPLITS.items():
        if word.lower() in words:
            return name
    raise UserError(f"{where}: split {word!r} is none of {', '.join(SPLITS)}")


def table_items(table: Path) -> tuple[list[Item | Lost], str]:
    """Return the images of a table, and its fingerprint."""
    if not table.is_file():
        raise UserError(f"images={table} does not exist")
    items: list[Item | Lost] = []
    sources: set[str] = set()
    columns: set[str] = set()
    for number, row in rows(table):
        where = f"{table.name} line {number}"
        if isinstance(row, str):
            items.append(Lost(where, row))
            continue
        columns |= row.keys()
        item = _item(table, row, where)
        if isinstance(item, Item) and item.source in sources:
            item = Lost(where, f"{item.source} is listed twice")
        sources.add(item.source)
        items.append(item)
    if not columns & {*PATHS}:
        listed = f" but {', '.join(sorted(columns))}" if columns else ""
        raise UserError(
            f"images={table} has no column of paths{listed}: name one path, image or filename"
        )
    return items, sha256_of(table)


def _item(table: Path, row: dict[str, Any], where: str) -> Item | Lost:
    """Return a row's image; a relative path is relative to the table's folder."""
    try:
        path = _path(row)
        captions, split = first_texts(row, CAPTIONS), first_text(row, (SPLIT,))
        label = label_of(row.get(LABEL))
    except ValueError as error:
        return Lost(where, str(error))
    name = path.encode("utf-8", "backslashreplace").decode()  # a name in no UTF-8, spelled out
    if not path:
        return Lost(where, "no path")
    if "://" in path:
        return Lost(where, f"{name} is an address, not a file: download it first")
    if "\0" in path:
        return Lost(where, "its path holds a NUL character")
    try:
        file = table.parent / Path(path).expanduser()
    except RuntimeError:  # no such user, so the name itself may begin with ~
        file = table.parent / path
    return Item(
        name,
        partial(file_bytes, file),
        next(iter(captions), ""),
        split_name(split, f"{table.parent / where}") if split else "",
        extra={LABEL: label} if label else {},
        further=tuple(captions[1:]),
    )


def _path(row: dict[str, Any]) -> str:
    """Return the row's path as it stands: a file's name may be no UTF-8."""
    for name in PATHS:
        path = row.get(name)
        if path is None or (isinstance(path, str) and not path.strip()):
            continue
        if not isinstance(path, str):
            raise ValueError("its path is no text")
        return path
    return ""
