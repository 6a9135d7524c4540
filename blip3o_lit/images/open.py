"""From the word after `images=` to a source: folder, table, or tars."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.folder import read_folder
from blip3o_lit.images.item import Item, Lost, Part, Source, slices
from blip3o_lit.images.split_file import assigned, assigned_in_tars, endings, read_splits
from blip3o_lit.images.table import TABLES, table_items
from blip3o_lit.images.tar_urls import tar_urls
from blip3o_lit.images.tars import tar_parts


@dataclass(frozen=True)
class Given:
    """A part of which a file names the splits of some images."""

    part: Part
    splits: dict[str, str]
    split: str = ""

    @property
    def name(self) -> str:
        """Return the part's name."""
        return self.part.name

    @property
    def length(self) -> int | None:
        """Return the part's length."""
        return self.part.length

    def entries(self, skip: int = 0) -> Iterator[Item | Lost]:
        """Yield the part's entries with their splits."""
        for entry in self.part.entries(skip):
            if isinstance(entry, Item) and entry.source in self.splits:
                yield replace(entry, split=self.splits[entry.source])
            else:
                yield entry


def open_source(
    images: str, shard_samples: int, splits: str | None = None, out: str | None = None
) -> Source:
    """Return the images that `images=` names.

    Args:
        images: A folder, a .csv, .tsv or .jsonl file, or tars: paths or addresses, with braces or
            `*`.
        shard_samples: Entries of one unit of work.
        splits: A table of `path` and `split`; it wins over every other rule.
        out: The folder of the store that is being made, which is no source.

    Raises:
        UserError: If there is no such thing, or nothing in it.
    """
    file = Path(os.path.expanduser(splits)) if splits else Path()
    given = read_splits(file) if splits else {}
    path = Path(os.path.expanduser(images))  # an unknown ~user stays as it is
    store = Path(os.path.expanduser(out)) if out else None
    tars: list[str] = []
    items: list[Item | Lost] = []
    beside: list[Lost] = []
    captions, fingerprint = True, ""
    if "://" not in images and os.path.isdir(path):
        folder = read_folder(path, store)
        items, tars, beside = folder.items, folder.tars, folder.beside
        captions = folder.captions or bool(tars)
        fingerprint = folder.fingerprint if items else ""
    elif "://" not in images and path.suffix.lower() in TABLES:
        items, captions, fingerprint = table_items(path)
    elif "://" in images or images.startswith("pipe:") or _names_tars(path):
        tars = tar_urls(images if "://" in images else str(path), store)
    elif not os.path.exists(path):
        raise UserError(
            f"images={images} does not exist; it may be a folder, tars, .csv, .tsv or .jsonl"
        )
    else:
        raise UserError(f"images={images} is no folder, .tar, .csv, .tsv or .jsonl")
    parts: list[Part] = []
    if tars:
        tar_list, digest = tar_parts(tars)
        if given:
            given = assigned_in_tars(given, file, tar_list, (item.source for item in items))
        parts += [Given(part, given) if given else part for part in tar_list]
        fingerprint = digest + fingerprint
    elif given:
        home = path if path.is_dir() else path.parent
        given = assigned(given, file, (item.source for item in items), endings(home))
    column = any(item.split for item in items if isinstance(item, Item))
    if given:
        items = [_with_split(item, given) for item in items]
    splits_given = [bool(item.split) for item in items if isinstance(item, Item)]
    words = "; else ".join(filter(None, (_words(given), "given by the table" if column else "")))
    return Source(
        images,
        parts + slices(items, shard_samples),
        captions,
        words,
        all_split=bool(splits_given) and all(splits_given) and not tars,
        fingerprint=fingerprint + _digest(given),
        beside=beside,
    )


def _names_tars(path: Path) -> bool:
    name = path.name.lower()
    return ".tar" in name or ".tgz" in name


def _words(given: dict[str, str]) -> str:
    return "given by split.file" if given else ""


def _digest(given: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(given.items())).encode()).hexdigest() if given else ""


def _with_split(item: Item | Lost, given: dict[str, str]) -> Item | Lost:
    if isinstance(item, Item) and item.source in given:
        return replace(item, split=given[item.source])
    return item
