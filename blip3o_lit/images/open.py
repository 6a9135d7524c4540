"""From the word after `images=` to a source: folder, table, or tars."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.folder import Listing, read_folder
from blip3o_lit.images.item import Item, Part, Source, slices, with_split
from blip3o_lit.images.names import extension_of
from blip3o_lit.images.split_file import assigned, assigned_in_tars, endings, read_splits
from blip3o_lit.images.table import TABLES, table_items
from blip3o_lit.images.tar_urls import tar_urls
from blip3o_lit.images.tars import tar_parts


def open_source(
    images: str, shard_samples: int, splits: str | None = None, out: str | None = None
) -> Source:
    """Return the images that `images=` names: a folder, a table, or tars with braces or `*`.

    A unit of work has `shard_samples` entries. `splits` is a table of `path` and `split`, which
    wins over every other rule; `out` the folder of the store that is being made: no source.
    """
    split_file = Path(os.path.expanduser(splits)) if splits else None
    by_name = read_splits(split_file) if split_file else {}
    listing = _list(images, out)
    items, fingerprint = listing.items, listing.fingerprint
    names = (item.source for item in items)
    parts: list[Part] = []
    if listing.tars:
        tars, digest = tar_parts(listing.tars)
        if split_file:
            by_name = assigned_in_tars(by_name, split_file, tars, names)
        parts += [replace(tar, splits=by_name) for tar in tars]
        fingerprint = digest + fingerprint
    elif split_file:
        path = Path(os.path.expanduser(images))
        home = path if path.is_dir() else path.parent
        by_name = assigned(by_name, split_file, names, endings(home))
    rules = ["given by split.file"] if split_file else []
    if any(item.split for item in items if isinstance(item, Item)):
        rules.append("given by the table")
    if split_file:
        items = [with_split(item, by_name) for item in items]
        fingerprint += hashlib.sha256(repr(sorted(by_name.items())).encode()).hexdigest()
    pictures = [item for item in items if isinstance(item, Item)]
    return Source(
        images,
        parts + slices(items, shard_samples),
        captions=bool(listing.tars) or any(item.caption for item in pictures),
        split_rule="; else ".join(rules),
        all_split=bool(pictures) and not listing.tars and all(item.split for item in pictures),
        fingerprint=fingerprint,
        beside=listing.beside,
    )


def _list(images: str, out: str | None) -> Listing:
    path = Path(os.path.expanduser(images))  # an unknown ~user stays as it is
    store = Path(os.path.expanduser(out)) if out else None
    if "://" in images or images.startswith("pipe:"):
        return Listing(tars=tar_urls(images, store))
    if os.path.isdir(path):
        return read_folder(path, store)
    if extension_of(path.name) in TABLES:
        items, fingerprint = table_items(path)
        return Listing(items, fingerprint=fingerprint)
    if ".tar" in path.name.lower() or ".tgz" in path.name.lower():
        return Listing(tars=tar_urls(str(path), store))
    if os.path.exists(path):
        raise UserError(f"images={images} is no folder, .tar, .csv, .tsv or .jsonl")
    raise UserError(
        f"images={images} does not exist; it may be a folder, tars, .csv, .tsv or .jsonl"
    )
