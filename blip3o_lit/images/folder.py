"""Images of a folder and its subfolders, each with a caption file beside it or none."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

from blip3o_lit.base.words import pasteable
from blip3o_lit.config.errors import UserError
from blip3o_lit.images.item import EXTENSIONS, Item, Lost, Reject, file_bytes
from blip3o_lit.images.names import extension_of, plain, stem_of
from blip3o_lit.images.text import GARBLED, encoding, is_text, json_text, text_of
from blip3o_lit.images.walk import below, is_token_store

CAPTIONS = ("txt", "caption", "json")
TABLES = ("csv", "tsv", "jsonl")
CAPTION_BYTES = 1 << 18
"""Longer caption files are refused."""
CAPTION_KEYS = ("caption", "text", "prompt")
"""Fields of a .json in which a caption is looked for, in this order."""


def caption_of(content: bytes, extension: str) -> str:
    """Return the caption in a txt, caption or json file; what is no text is replaced."""
    text = content.decode(encoding(content), errors="replace").strip()
    try:
        return json_text(text, CAPTION_KEYS) if extension == "json" else text_of(text)
    except (ValueError, RecursionError):
        return ""


@dataclass(frozen=True)
class Folder:
    """The pictures and tars below a folder."""

    items: list[Item | Lost]
    """Pictures, and what of them is known to be lost, in order."""
    tars: list[str]
    """Paths of tars."""
    captions: bool
    """Whether any picture has one."""
    fingerprint: str
    """Changes with the pictures' names, sizes and captions."""
    beside: list[Lost]
    """What is no picture and is not read."""


def read_folder(folder: Path, out: Path | None = None) -> Folder:
    """List the pictures and tars of a folder; see `below` for what is not entered.

    Raises:
        UserError: If there are none, or the folder is a token store or can't be listed.
    """
    try:
        if is_token_store(folder) and not _same(folder, out):
            raise UserError(f"images={folder} is a token store: data.tokens={folder} trains on it")
        listing = below(folder, out)
    except OSError as error:
        raise UserError(f"images={folder} can't be listed ({error.strerror})") from error
    if _same(folder, out):
        raise UserError(f"out={out} is the folder of the pictures itself: choose another")
    beside, used = listing.beside, set()
    items: list[Item | Lost] = list(listing.lost)
    digest = hashlib.sha256()
    captions = False
    texts = {(stem_of(name), extension_of(name)): name for name in listing.others}
    for name in listing.pictures:
        caption = ""
        for stem, extension in product((name, stem_of(name)), CAPTIONS):  # a.png.txt, a.txt
            text = texts.get((stem, extension))
            if text is None:
                continue
            used.add(text)
            try:
                content = file_bytes(folder / text, CAPTION_BYTES)
                if not is_text(content):
                    beside.append(Lost(plain(text), GARBLED, image=False))
                caption = caption or caption_of(content, extension)
            except Reject as error:
                beside.append(Lost(plain(text), f"a caption that is not read: {error}", False))
        captions = captions or bool(caption)
        source = plain(name)
        digest.update(f"{source}\t{_size(folder / name)}\t{caption}\n".encode(errors="replace"))
        items.append(Item(source, partial(file_bytes, folder / name), caption))
    items.sort(key=lambda item: item.source)
    for name in listing.others:
        if extension_of(name) in TABLES:
            words = pasteable("images", str(folder / name))
            reason = f"a table is not read with its folder: {words} reads what it lists"
            beside.append(Lost(plain(name), plain(reason), image=False))
        elif name not in used:
            listing.passed.add(name)
    if words := listing.passed.words():
        beside.append(Lost(plain(folder.name or str(folder)), words, image=False))
    if not listing.pictures and not listing.tars:
        kinds = f"images={folder} holds no .{', .'.join(EXTENSIONS)}, and no .tar either"
        rest = [f"{entry.source}: {entry.reason}" for entry in (*listing.lost, *beside)][:2]
        raise UserError("; ".join([kinds, *rest]))
    tars = [str(folder / name) for name in listing.tars]
    return Folder(items, tars, captions, digest.hexdigest(), beside)


def _same(folder: Path, out: Path | None) -> bool:
    return out is not None and folder.resolve() == out.resolve()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
