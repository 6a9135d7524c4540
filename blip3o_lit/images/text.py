"""Text that strangers wrote: encodings, captions of any JSON type, labels, half characters."""

import json
import math
import re
from pathlib import Path
from typing import Any

from blip3o_lit.config.errors import UserError

MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
"""Byte-order marks; UTF-32's little-endian one begins like UTF-16's, so it comes first."""
GARBLED = "a caption in another encoding than UTF-8: letters of it are lost; save it as UTF-8"
NOTHING = ("", "nan", "NaN")
"""What stands for no text; the words are those that pandas makes of a gap."""


def encoding(content: bytes) -> str:
    """Return the encoding that a file's first bytes tell: by its mark, else UTF-8."""
    return next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")


def is_text(content: bytes) -> bool:
    try:
        content.decode(encoding(content))
    except UnicodeDecodeError:
        return False
    return True


def read_text(file: Path) -> str:
    """Return a text file's content, without its byte-order mark."""
    try:
        content = file.read_bytes()  # once: it may be a pipe, `classes=<(ls photos)`
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from error
    name = encoding(content)
    if name == "utf-8" and b"\0" in content[:4]:
        raise UserError(f"{file} is UTF-16 without a byte-order mark, or no text: save it as UTF-8")
    try:
        return content.decode(name).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        if not name.startswith("utf-8"):
            raise UserError(f"{file} is damaged {name.upper()}: save it as UTF-8") from error
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{file} line {line} is not UTF-8 (byte {error.object[error.start]:#04x}; "
            "Windows-1252 or Latin-1?): save it as UTF-8"
        ) from error


def whole(text: str) -> str:
    """Return text without surrogates: pairs are joined, halves become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def text_of(value: Any) -> str:
    """Return a cell or a JSON value as text: of a list its first that is not empty.

    Empty text, null and not-a-number are an empty string; whole floats lose their point. An object,
    or a list in a list, is a ValueError.
    """
    if isinstance(value, list):
        if any(isinstance(item, (list, dict, tuple)) for item in value):
            raise ValueError("a nested list is no text")
        return next((text for text in map(text_of, value) if text), "")
    if isinstance(value, (dict, tuple)):
        raise ValueError("an object is no text")
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    text = "" if value is None else whole(str(value)).strip().strip("\ufeff").strip()
    return "" if text in NOTHING else text


def texts_of(value: Any) -> list[str]:
    """Return all texts of a cell or a JSON value: of a list each that is not empty.

    What `text_of` refuses is a ValueError here too.
    """
    first = text_of(value)
    rest = [text_of(item) for item in value] if isinstance(value, list) else [first]
    return [text for text in rest if text]


def label_of(value: Any) -> str:
    """Return a label as text; `3.0`, which pandas makes of 3 beside a gap, is 3 again."""
    text = text_of(value)
    return text.partition(".")[0] if re.fullmatch(r"-?[0-9]+\.0+", text) else text


def first_text(row: dict[str, Any], names: tuple[str, ...]) -> str:
    """Return the first text under the names; a ValueError says which of them holds none."""
    for name in names:
        try:
            text = text_of(row.get(name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if text:
            return text
    return ""


def first_texts(row: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    """Return all texts of the first name that has any; the first of them is `first_text`'s."""
    if not first_text(row, names):
        return []
    return next(texts for name in names if (texts := texts_of(row.get(name))))


def column(name: str) -> str:
    """Return a column's name as it is compared: small letters and digits alone."""
    return re.sub(r"[\W_]+", "", name).lower()


def json_texts(content: str, names: tuple[str, ...]) -> list[str]:
    """Return the texts of a JSON document: its own, or of the first of an object's fields with any.

    A ValueError says that it is no JSON or no text, a RecursionError that it is nested too deep.
    """
    data = json.loads(content)
    if not isinstance(data, dict):
        return texts_of(data)
    return first_texts({column(name): value for name, value in data.items()}, names)
