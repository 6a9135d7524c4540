"""Images that a CSV or JSONL file lists, with captions, splits and labels where it has them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.item import Item, Lost, file_bytes
from blip3o_lit.images.text import column, encoding_of, label_of, not_text, text_of

TABLES = (".csv", ".tsv", ".jsonl")
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
    """Yield line numbers and rows; a row that can't be read comes as the reason.

    Raises:
        UserError: If the file can't be read, is no text, or a CSV has no sound header or an open
            quote.
    """
    name = encoding_of(table)
    try:
        with open(table, encoding=name, newline="") as file:
            if table.suffix.lower() != ".jsonl":
                yield from _csv_rows(table, file)
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line)
    except UnicodeError as error:
        raise not_text(table, name) from error


def _csv_rows(table: Path, file: TextIO) -> Iterator[tuple[int, Row]]:
    start = []  # the header, and empty lines before it
    for line in file:
        start.append(line)
        if line.strip():
            break
    delimiter = _delimiter(start[-1] if start else "")
    lines = csv.reader(chain(start, file), delimiter=delimiter, skipinitialspace=True, strict=True)
    names: list[str] = []
    last = 0
    try:
        for fields in lines:
            last = lines.line_num
            if len(fields) < 2 and not "".join(fields).strip():
                continue
            if not names:
                names = [column(field) for field in fields]
                if twice := _twice(names):
                    raise UserError(f"{table} has two columns named {twice}: rename one")
            elif "".join(fields[len(names) :]).strip():
                reason = f"{len(fields)} cells, the header has {len(names)}: quote text with commas"
                yield last, reason
            else:
                yield last, {name: field.strip() for name, field in zip(names, fields)}
    except csv.Error as error:
        limit = csv.field_size_limit()
        reason = {
            f"field larger than field limit ({limit})": f"a cell of over {limit} characters: "
            "a quote may be left open, or the text must be shortened",
            "unexpected end of data": "a quote is left open",
        }.get(str(error), f"{error}: double the quotes inside quoted text")
        raise UserError(f"{table} line {last + 1}: {reason}") from error


def _delimiter(header: str) -> str:
    """Return the sign that makes a column of paths of the header, else a comma."""

    def columns(sign: str) -> set[str]:
        return {column(name) for name in header.split(sign)}

    return next((sign for sign in DELIMITERS if columns(sign) & {*PATHS}), ",")


def _twice(names: list[str]) -> str:
    """Return a column that is read and that the names hold twice, or an empty string."""
    used = (*PATHS, *CAPTIONS, SPLIT, LABEL)
    return next((name for name in used if names.count(name) > 1), "")


def _parse(line: str) -> Row:
    try:
        data = json.loads(line, object_pairs_hook=tuple)  # a dict would drop repeated names
    except (ValueError, RecursionError):
        return "no JSON"
    if not isinstance(data, tuple):
        return "no JSON object"
    names = [column(name) for name, _ in data]
    if twice := _twice(names):
        return f"{twice} is there twice"
    return dict(zip(names, (value for _, value in data)))


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first text under the names.

    Raises:
        ValueError: If something else stands there.
    """
    for name in names:
        try:
            text = text_of(row.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if text:
            return text
    return ""


def split_name(word: str, where: str) -> str:
    """Return a split's name as stores write it: `val` and `dev` mean validation.

    Raises:
        UserError: If it is no split; `where` names the file and line.
    """
    for name, words in SPLITS.items():
        if word.lower() in words:
            return name
    raise UserError(f"{where}: split {word!r} is none of {', '.join(SPLITS)}")


def table_items(table: Path) -> tuple[list[Item | Lost], bool, str]:
    """List the images of a table; relative paths are relative to the table's folder.

    Returns:
        The items, whether any has a caption, and a fingerprint of the table.

    Raises:
        UserError: If the file is missing, empty, or has no column of paths, or names a split that
            is none.
    """
    if not table.is_file():
        raise UserError(f"images={table} does not exist")
    items: list[Item | Lost] = []
    seen: set[str] = set()
    columns: set[str] = set()
    for number, row in rows(table):
        where = f"{table.name} line {number}"
        if isinstance(row, str):
            items.append(Lost(where, row))
            continue
        columns |= row.keys()
        try:
            item = _item(table, row, where)
        except UserError:
            raise
        except ValueError as error:
            item = Lost(where, str(error))
        if isinstance(item, Item):
            if item.source in seen:
                item = Lost(where, f"{item.source} is listed twice")
            else:
                seen.add(item.source)
        items.append(item)
    if not columns & {*PATHS}:
        listed = f" but {', '.join(sorted(columns))}" if columns else ""
        raise UserError(
            f"images={table} has no column of paths{listed}: name one path, image or filename"
        )
    captions = any(isinstance(item, Item) and item.caption for item in items)
    with open(table, "rb") as file:
        return items, captions, hashlib.file_digest(file, "sha256").hexdigest()


def _item(table: Path, row: dict[str, Any], where: str) -> Item | Lost:
    """Return a row's image.

    Raises:
        ValueError: If a cell that is read holds no text.
    """
    path = _path(row)
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
    split, label = _first(row, (SPLIT,)), label_of(row.get(LABEL))
    return Item(
        name,
        partial(file_bytes, file),
        _first(row, CAPTIONS),
        split_name(split, f"{table.parent / where}") if split else "",
        extra={LABEL: label} if label else {},
    )


def _path(row: dict[str, Any]) -> str:
    """Return the row's path as it stands: a file's name may be no UTF-8."""
    values = [row[name] for name in PATHS if row.get(name) not in (None, "")]
    path = next((value for value in values if not isinstance(value, str) or value.strip()), "")
    if not isinstance(path, str):
        raise ValueError("its path is no text")
    return path
