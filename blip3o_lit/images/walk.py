"""What lies below a folder: every entry is a picture, a tar, a caption, or is named and counted."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from blip3o_lit.images.item import EXTENSIONS, Lost
from blip3o_lit.images.names import ARCHIVES, Passed, companion, extension_of, plain, unread


@dataclass
class Below:
    """The entries below a folder by kind, as names relative to it."""

    pictures: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    """Pictures of other formats, and folders that can't be listed."""
    beside: list[Lost] = field(default_factory=list)
    """What is not read and named one by one: links to folders, archives, token stores."""
    others: list[str] = field(default_factory=list)
    """Files of any other name, captions among them."""
    passed: Passed = field(default_factory=Passed)
    """Hidden files and companions."""

    def skip(self, name: str, reason: str) -> None:
        self.beside.append(Lost(plain(name), reason, image=False))


def below(folder: Path, out: Path | None = None) -> Below:
    """List a folder and its subfolders.

    Links to folders are not followed, token stores and the folder `out` not entered. An OSError
    says that the folder itself can't be listed.
    """
    listing = Below()
    own = os.path.realpath(out) if out is not None else None
    stack = [""]
    while stack:
        place = stack.pop()
        try:
            with os.scandir(folder / place) as entries:
                children = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not place:
                raise
            reason = f"the folder can't be listed ({error.strerror}): what it holds is not read"
            listing.lost.append(Lost(plain(place), reason))
            continue
        if place and os.path.realpath(folder / place) == own:
            listing.skip(place, "the folder of this extraction's own store is not read")
            continue
        if place and is_token_store(folder / place):
            listing.skip(place, "a token store is not read")
            continue
        prefix = f"{place}/" if place else ""
        folders = [prefix + child.name for child in children if _sort(listing, prefix, child)]
        stack += reversed(folders)
    for names in (listing.pictures, listing.tars, listing.others):
        names.sort()
    return listing


def _sort(listing: Below, prefix: str, entry: os.DirEntry[str]) -> bool:
    """Put an entry where it belongs; returns whether it is a folder to enter."""
    name = prefix + entry.name
    extension = extension_of(name)
    if companion(name):
        listing.passed.add(name)
    elif entry.name.startswith("."):
        listing.passed.hidden.append(plain(name))
    elif _is_folder(entry):
        if extension in (*EXTENSIONS, "tar"):
            listing.skip(name, "a folder, for all its name; what it holds is read")
        return True
    elif entry.is_symlink() and os.path.isdir(entry.path):
        reason = "a link to a folder is not followed: give that folder itself, or copy it here"
        listing.skip(name, reason)
    elif extension in EXTENSIONS:
        listing.pictures.append(name)
    elif extension == "tar" and os.path.isfile(entry.path):
        listing.tars.append(name)
    elif extension == "tar":
        listing.lost.append(Lost(plain(name), "no regular file"))
    elif reason := unread(name):
        listing.lost.append(Lost(plain(name), reason))
    elif extension in ARCHIVES:
        listing.skip(name, "an archive of this kind is not read: unpack it")
    else:
        listing.others.append(name)
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:  # its name will say what it was meant to be, and reading it what is wrong
        return False


def is_token_store(folder: Path) -> bool:
    """Whether a folder holds a token store, finished or not."""
    if os.path.exists(folder / ".extract"):
        return True
    try:
        index = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(index, dict) and {"arrays", "shards"} <= index.keys()
