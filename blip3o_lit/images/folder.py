"""Images of a folder and its subfolders, each with a caption file beside it or none."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

from blip3o_lit.base.words import pasteable
from blip3o_lit.config.errors import UserError
from blip3o_lit.images.item import EXTENSIONS, Item, Lost, Reject, file_bytes
from blip3o_lit.images.names import extension_of, plain, stem_of
from blip3o_lit.images.table import TABLES
from blip3o_lit.images.text import GARBLED, encoding, is_text, json_texts, texts_of
from blip3o_lit.images.walk import Below, below, is_token_store

CAPTIONS = ("txt", "caption", "json")
CAPTION_BYTES = 1 << 18
"""Longer caption files are refused."""
CAPTION_KEYS = ("caption", "text", "prompt")
"""Fields of a .json in which a caption is looked for, in this order."""


@dataclass
class Listing:
    """What the word after `images=` names."""

    items: list[Item | Lost] = field(default_factory=list)
    """Pictures, and what of them is known to be lost, in order."""
    tars: list[str] = field(default_factory=list)
    fingerprint: str = ""
    """Changes with the items' names, sizes and captions."""
    beside: list[Lost] = field(default_factory=list)
    """What is no picture and is not read."""


def caption_of(content: bytes, extension: str) -> str:
    """Return the first caption in a file, empty where it has none."""
    return next(iter(captions_of(content, extension)), "")


def captions_of(content: bytes, extension: str) -> list[str]:
    """Return the captions in a txt, caption or json file; what is no text is replaced.

    A json file may have a list of them.
    """
    text = content.decode(encoding(content), errors="replace").strip()
    try:
        return json_texts(text, CAPTION_KEYS) if extension == "json" else texts_of(text)
    except (ValueError, RecursionError):
        return []


def read_folder(folder: Path, out: Path | None = None) -> Listing:
    """List the pictures and tars of a folder; see `below` for what is not entered."""
    is_out = out is not None and folder.resolve() == out.resolve()
    try:
        if is_token_store(folder) and not is_out:
            raise UserError(f"images={folder} is a token store: data.tokens={folder} trains on it")
        entries = below(folder, out)
    except OSError as error:
        raise UserError(f"images={folder} can't be listed ({error.strerror})") from error
    if is_out:
        raise UserError(f"out={out} is the folder of the pictures itself: choose another")
    captions, used = _captions(folder, entries)
    digest = hashlib.sha256()
    items: list[Item | Lost] = list(entries.lost)
    for name, texts in captions.items():
        caption = "\t".join(texts)
        source = plain(name)
        digest.update(f"{source}\t{_size(folder / name)}\t{caption}\n".encode(errors="replace"))
        read, first = partial(file_bytes, folder / name), next(iter(texts), "")
        items.append(Item(source, read, first, further=tuple(texts[1:])))
    items.sort(key=lambda item: item.source)
    _pass_over(folder, entries, used)
    if not entries.pictures and not entries.tars:
        kinds = f"images={folder} holds no .{', .'.join(EXTENSIONS)}, and no .tar either"
        rest = [f"{lost.source}: {lost.reason}" for lost in (*entries.lost, *entries.beside)]
        raise UserError("; ".join([kinds, *rest[:2]]))
    tars = [str(folder / name) for name in entries.tars]
    fingerprint = digest.hexdigest() if items else ""
    return Listing(items, tars, fingerprint, entries.beside)


def _captions(folder: Path, entries: Below) -> tuple[dict[str, list[str]], set[str]]:
    """Return the captions of each picture, and the files that are captions."""
    texts = {(stem_of(name), extension_of(name)): name for name in entries.others}
    captions: dict[str, list[str]] = {picture: [] for picture in entries.pictures}
    used: set[str] = set()
    for picture in entries.pictures:
        for stem, extension in product((picture, stem_of(picture)), CAPTIONS):
            text = texts.get((stem, extension))  # a.png.txt, or a.txt
            if text is None:
                continue
            used.add(text)
            try:
                content = file_bytes(folder / text, CAPTION_BYTES)
            except Reject as error:
                entries.skip(text, f"a caption that is not read: {error}")
                continue
            if not is_text(content):
                entries.skip(text, GARBLED)
            captions[picture] = captions[picture] or captions_of(content, extension)
    return captions, used


def _pass_over(folder: Path, entries: Below, used: set[str]) -> None:
    """Name or count the files that are neither pictures nor captions."""
    for name in entries.others:
        if extension_of(name) in TABLES:
            words = pasteable("images", str(folder / name))
            reason = f"a table is not read with its folder: {words} reads what it lists"
            entries.skip(name, plain(reason))
        elif name not in used:
            entries.passed.add(name)
    if words := entries.passed.words():
        entries.skip(folder.name or str(folder), words)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
