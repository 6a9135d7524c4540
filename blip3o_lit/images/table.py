"""Images that a CSV or JSONL file lists, with captions, splits and labels where it has them."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.item import Item, Lost, file_bytes

PATHS = ("path", "image", "image_path", "file", "file_name", "filename")
CAPTIONS = ("caption", "text", "prompt")
SPLIT, LABEL = "split", "label"
SPLIT_NAMES = {"val": "validation", "valid": "validation", "dev": "validation", "training": "train"}


def rows(table: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Yield line numbers and rows; a row that can't be read comes as the reason.

    Raises:
        UserError: If the file is no text, or a CSV has no header.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() == ".csv":
                reader = csv.DictReader(file, strict=True)
                for row in reader:
                    yield reader.line_num, {k: v for k, v in row.items() if k is not None}
                return
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, _parse(line)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table}: {error}; save it as UTF-8 text") from error


def _parse(line: str) -> dict[str, Any] | str:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        return "no JSON"
    return data if isinstance(data, dict) else "no JSON object"


def _first(row: dict[str, Any], names: tuple[str, ...]) -> str:
    return next((str(row[name]) for name in names if row.get(name) not in (None, "")), "")


def split_name(word: str) -> str:
    """Return a split's name as stores write it: `val` and `dev` mean validation."""
    return SPLIT_NAMES.get(word.strip().lower(), word.strip())


def table_items(table: Path) -> tuple[list[Item | Lost], bool, str]:
    """List the images of a table; relative paths are relative to the table's folder.

    Returns:
        The items, whether any has a caption, and a fingerprint of the table.

    Raises:
        UserError: If the file is missing, empty, or has no column of paths.
    """
    if not table.is_file():
        raise UserError(f"images={table} does not exist")
    items: list[Item | Lost] = []
    seen: set[str] = set()
    captions = paths = False
    for number, row in rows(table):
        where = f"{table.name} line {number}"
        if isinstance(row, str):
            items.append(Lost(where, row))
            continue
        name = _first(row, PATHS)
        if not name:
            items.append(Lost(where, "no path"))
            continue
        paths = True
        if "://" in name:
            items.append(Lost(where, f"{name} is an address, not a file: download it first"))
            continue
        if name in seen:
            items.append(Lost(where, f"{name} is listed twice"))
            continue
        seen.add(name)
        caption = _first(row, CAPTIONS)
        captions = captions or bool(caption)
        read = partial(file_bytes, table.parent / Path(name).expanduser())
        label = _first(row, (LABEL,))
        extra = {LABEL: label} if label else {}
        items.append(Item(name, read, caption, split_name(_first(row, (SPLIT,))), extra=extra))
    if not paths:
        raise UserError(f"images={table} has no column of paths: name one of {', '.join(PATHS)}")
    return items, captions, hashlib.sha256(table.read_bytes()).hexdigest()


def split_file(file: Path) -> dict[str, str]:
    """Read a table of `path` and `split`: the split of each named image.

    Raises:
        UserError: If it is missing or a row lacks either.
    """
    if not file.is_file():
        raise UserError(f"split.file={file} does not exist")
    found = {}
    for number, row in rows(file):
        path = "" if isinstance(row, str) else _first(row, PATHS)
        split = "" if isinstance(row, str) else _first(row, (SPLIT,))
        if not path or not split:
            raise UserError(f"split.file={file} line {number} lacks a path or a split")
        found[path] = split_name(split)
    return found
