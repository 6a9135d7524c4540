"""The file of `split.file`: which split it gives to each image of a source."""

from __future__ import annotations

import os
import posixpath
import tarfile
import unicodedata
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.table import PATHS, SPLIT, rows, split_name
from blip3o_lit.images.tars import TarPart
from blip3o_lit.images.text import text_of


def read_splits(file: Path) -> dict[str, str]:
    """Read a table of `path` and `split`: the split of each named image.

    Raises:
        UserError: If it is missing or empty, a row lacks either, or an image has two splits.
    """
    if not file.is_file():
        raise UserError(f"split.file={file} does not exist")
    splits: dict[str, str] = {}
    for number, row in rows(file):
        where = f"split.file={file} line {number}"
        if isinstance(row, str):
            raise UserError(f"{where} lacks a path or a split: {row}")
        try:
            path = next((text for name in PATHS if (text := text_of(row.get(name)))), "")
            word = text_of(row.get(SPLIT))
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        if not path or not word:
            raise UserError(f"{where} lacks a path or a split")
        split = split_name(word, where)
        if splits.setdefault(path, split) != split:
            raise UserError(f"{where}: {path} is in {splits[path]} too")
    if not splits:
        raise UserError(f"split.file={file} names no image")
    return splits


def assigned(
    splits: dict[str, str], file: Path, names: Iterable[str], prefixes: list[str]
) -> dict[str, str]:
    """Return the split of each image that the rows of a split file name.

    Args:
        splits: What `read_splits` returned.
        file: The split file.
        names: Images of the source.
        prefixes: What may stand before a name: folders, and their endings, of which all rows have
            to use the same.

    Raises:
        UserError: If a row names no image, or two rows give an image two splits.
    """
    known = set(names)
    if splits.keys() <= known:
        return splits
    fewest = list(splits)
    folders = [prefix for prefix in prefixes if prefix.startswith("/")]
    for prefix in ("", *prefixes):
        below = partial(_below, [*folders, prefix])
        images: dict[str, list[str]] = {}
        for name in known:
            images.setdefault(below(name), []).append(name)
        missing = [row for row in splits if below(row) not in images]
        if not missing:
            return _given(splits, {row: images[below(row)] for row in splits}, file)
        fewest = min(fewest, missing, key=len)
    raise UserError(
        f"split.file={file}: {len(fewest)} of its {len(splits)} rows name no image of this "
        f"source, such as {fewest[0]!r}; its images are called like {min(known, default='')!r}"
    )


def _given(splits: dict[str, str], images: dict[str, list[str]], file: Path) -> dict[str, str]:
    given: dict[str, str] = {}
    for row, split in splits.items():
        for name in images[row]:
            if given.setdefault(name, split) != split:
                raise UserError(f"split.file={file} gives {name} two splits")
    return given


def endings(folder: Path) -> list[str]:
    """Return the endings of a folder's path, the shortest first, the whole path last."""
    found: list[str] = []
    for path in (os.path.abspath(folder), os.path.realpath(folder)):
        parts = PurePosixPath(_plain(path)).parts
        found += [str(PurePosixPath(*parts[-count:])) for count in range(1, len(parts) + 1)]
    return list(dict.fromkeys(found))


def _plain(name: str) -> str:
    """Return a path without `./` and backslashes, accented letters written in one way."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _below(prefixes: list[str], name: str) -> str:
    name = _plain(name)
    for prefix in prefixes:
        name = name.removeprefix(f"{prefix}/")
    return name


def assigned_in_tars(
    splits: dict[str, str], file: Path, parts: list[TarPart], loose: Iterable[str] = ()
) -> dict[str, str]:
    """Return the split of each tar member, or loose picture, that the rows name; see `assigned`.

    The members of a remote or damaged tar are not known: rows that begin with its name are taken
    as they are. The name of a single tar may be left out.

    Raises:
        UserError: If a row names no member.
    """
    names = set(loose)
    unlisted: list[str] = []
    for part in parts:
        if "://" in part.url:
            unlisted.append(f"{part.label}/")
            continue
        try:
            with tarfile.open(part.url, "r:", ignore_zeros=True) as archive:
                names |= {f"{part.label}/{member.name}" for member in archive}
        except (OSError, tarfile.TarError):  # reading its images will say what is wrong with it
            unlisted.append(f"{part.label}/")
    names |= {row for row in splits if row.startswith(tuple(unlisted))}
    first = parts[0]
    alone = [first.label] if len(parts) == 1 else []
    return assigned(
        splits, file, names, [*endings(Path(first.url.removesuffix(first.label))), *alone]
    )
