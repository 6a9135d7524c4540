"""Images of a folder and its subfolders, each with a caption file beside it or none."""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path

from blip3o_lit.config.errors import UserError
from blip3o_lit.images.item import EXTENSIONS, Item, Lost, file_bytes
from blip3o_lit.images.text import encoding, json_text, text_of

CAPTIONS = ("txt", "caption", "json")
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


def files_below(folder: Path, extensions: tuple[str, ...]) -> list[str]:
    """Return the files with these extensions below a folder, relative, in a fixed order.

    Hidden files and folders are passed over, and links to folders are not followed.
    """
    found = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and name.lower().rpartition(".")[2] in extensions:
                found.append((Path(place) / name).relative_to(folder).as_posix())
    return sorted(found)


def folder_items(folder: Path) -> tuple[list[Item | Lost], bool, str]:
    """List the images of a folder.

    Returns:
        The items, whether any has a caption, and a fingerprint of names and sizes.

    Raises:
        UserError: If there are none.
    """
    names = files_below(folder, EXTENSIONS)
    if not names:
        raise UserError(f"images={folder} holds no .{', .'.join(EXTENSIONS)}, and no .tar either")
    items: list[Item | Lost] = []
    digest = hashlib.sha256()
    captions = False
    for name in names:
        path = folder / name
        caption = _caption_beside(path)
        captions = captions or bool(caption)
        size = path.stat().st_size if path.exists() else -1
        digest.update(f"{name}\t{size}\t{caption}\n".encode())
        items.append(Item(name, partial(file_bytes, path), caption))
    return items, captions, digest.hexdigest()


def _caption_beside(path: Path) -> str:
    for extension in CAPTIONS:
        beside = path.with_suffix(f".{extension}")
        if beside.is_file() and beside.stat().st_size <= CAPTION_BYTES:
            return caption_of(beside.read_bytes(), extension)
    return ""
