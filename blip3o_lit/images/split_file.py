"""The file of `split.file`: which split it gives to each image of a source."""

import os
import posixpath
import tarfile
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.table import PATHS, SPLIT, rows, split_name
from blip3o_lit.images.tars import TarPart
from blip3o_lit.images.text import first_text


def read_splits(file: Path) -> dict[str, str]:
    """Return the split of each path that a table of `path` and `split` names."""
    if not file.is_file():
        raise UserError(f"split.file={file} does not exist")
    splits: dict[str, str] = {}
    for number, row in rows(file):
        where = f"split.file={file} line {number}"
        if isinstance(row, str):
            raise UserError(f"{where} lacks a path or a split: {row}")
        try:
            path, word = first_text(row, PATHS), first_text(row, (SPLIT,))
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

    `prefixes` may stand before a name: folders, and their endings, of which all rows have to use
    the same.
    """
    known = set(names)
    if splits.keys() <= known:
        return splits
    fewest = list(splits)
    folders = [prefix for prefix in prefixes if prefix.startswith("/")]
    for prefix in ("", *prefixes):
        images: dict[str, list[str]] = defaultdict(list)
        for name in known:
            images[_below([*folders, prefix], name)].append(name)
        by_row = {row: images.get(_below([*folders, prefix], row), []) for row in splits}
        missing = [row for row in splits if not by_row[row]]
        if not missing:
            return _by_image(splits, by_row, file)
        fewest = min(fewest, missing, key=len)
    raise UserError(
        f"split.file={file}: {len(fewest)} of its {len(splits)} rows name no image of this "
        f"source, such as {fewest[0]!r}; its images are called like {min(known, default='')!r}"
    )


def _by_image(splits: dict[str, str], images: dict[str, list[str]], file: Path) -> dict[str, str]:
    by_image: dict[str, str] = {}
    for row, split in splits.items():
        for name in images[row]:
            if by_image.setdefault(name, split) != split:
                raise UserError(f"split.file={file} gives {name} two splits")
    return by_image


def endings(folder: Path) -> list[str]:
    """Return the endings of a folder's path, the shortest first, the whole path last."""
    listed: list[str] = []
    for path in (os.path.abspath(folder), os.path.realpath(folder)):
        parts = PurePosixPath(_plain(path)).parts
        listed += [str(PurePosixPath(*parts[-count:])) for count in range(1, len(parts) + 1)]
    return list(dict.fromkeys(listed))


def _plain(name: str) -> str:
    """Return a path without `./` and backslashes, accented letters written in one way."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def _below(prefixes: list[str], name: str) -> str:
    name = _plain(name)
    for prefix in prefixes:
        name = name.removeprefix(f"{prefix}/")
    return name


def assigned_in_tars(
    splits: dict[str, str], file: Path, parts: list[TarPart], loose: Iterable[str]
) -> dict[str, str]:
    """Return the split of each tar member, or loose picture, that the rows name; see `assigned`.

    The members of a remote or damaged tar are not known: rows that begin with its name are taken
    as they are. The name of a single tar may be left out.
    """
    names = set(loose)
    unlisted: list[str] = []
    for part in parts:
        if part.is_remote:
            unlisted.append(f"{part.name}/")
            continue
        try:
            with tarfile.open(part.url, "r:", ignore_zeros=True) as archive:
                names |= {f"{part.name}/{member.name}" for member in archive}
        except (OSError, tarfile.TarError):  # reading its images will say what is wrong with it
            unlisted.append(f"{part.name}/")
    names |= {row for row in splits if row.startswith(tuple(unlisted))}
    first = parts[0]
    prefixes = endings(Path(first.url.removesuffix(first.name)))
    if len(parts) == 1:
        prefixes.append(first.name)
    return assigned(splits, file, names, prefixes)
