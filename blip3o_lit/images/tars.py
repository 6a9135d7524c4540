"""Images of WebDataset tars, local or behind a URL, read in order and never unpacked to disk.

Neighbours whose names agree up to the first dot are a sample: a picture and, optionally, a caption
(txt, caption, json) and a label (cls: a class's name or number). Where a sample has several
pictures, as dates and version numbers in names make it, each of them is one of its own. Nothing
else is decoded, and what is passed over is counted.
"""

from __future__ import annotations

import hashlib
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import aiohttp

from blip3o_lit.base.remote import open_remote
from blip3o_lit.config.errors import UserError
from blip3o_lit.images.folder import CAPTION_BYTES, CAPTIONS, caption_of
from blip3o_lit.images.item import EXTENSIONS, MAX_BYTES, Item, Lost
from blip3o_lit.images.names import (
    ARCHIVES,
    Passed,
    companion,
    extension_of,
    plain,
    unread,
)
from blip3o_lit.images.sample import LABEL, Sample, Text
from blip3o_lit.images.text import GARBLED, is_text

DANGEROUS = ("pkl", "pickle", "pyd", "pth", "pt", "bin", "ckpt", "joblib", "so", "dll", "py", "sh")
"""Members that other tools would unpickle or run; here they are refused by name and counted."""
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""First bytes of compressed files."""
HELD_BYTES = MAX_BYTES
"""A sample that holds more is handed on before its end."""
ATTEMPTS = 4
PAUSE = 1.0
"""Seconds before the second attempt at a remote tar; each further one waits twice as long."""


class StrictTarInfo(tarfile.TarInfo):
    """Headers that must be sound: by default a damaged one silently ends the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> StrictTarInfo:
        """Read the next header.

        After an end mark the file may end, or another tar may follow (`cat a.tar b.tar`).

        Raises:
            tarfile.ReadError: On a damaged header, or an archive that stops without its end mark.
        """
        try:
            member = super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tarfile_.ended = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            ended = getattr(tarfile_, "ended", False)
            short = (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError)  # type: ignore[attr-defined]
            if ended and isinstance(error, short):  # no room for another header
                raise
            what = "what follows its end mark is no tar" if ended else "damaged or cut off"
            raise tarfile.ReadError(f"{what} ({error})") from error
        tarfile_.ended = False  # type: ignore[attr-defined]
        return member


@dataclass(frozen=True)
class TarPart:
    """One tar."""

    url: str
    """A path, or an address with one of `SCHEMES`."""
    label: str
    """Its name without the machine's folders."""
    split: str = ""
    length: None = None

    @property
    def name(self) -> str:
        """Return what messages call it."""
        return self.label

    def entries(self, skip: int = 0) -> Iterator[Item | Lost]:
        """Yield samples and refused members from number `skip` on.

        A remote tar whose connection breaks is opened again, a few times.

        Raises:
            UserError: If the tar can't be opened, is damaged or cut off.
        """
        failures = 0
        while True:
            try:
                for entry in self._read(skip):
                    yield entry
                    skip, failures = skip + 1, 0
                return
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                failures += 1
                lasting = "://" not in self.url or isinstance(error, FileNotFoundError)
                if lasting or failures == ATTEMPTS:
                    reason = "it is not there" if isinstance(error, FileNotFoundError) else error
                    raise UserError(f"{self.url} can't be read ({reason})") from error
                time.sleep(PAUSE * 2 ** (failures - 1))

    def _read(self, skip: int) -> Iterator[Item | Lost]:
        try:
            with (
                open_tar(self.url) as file,
                tarfile.open(
                    fileobj=file, mode="r|", tarinfo=StrictTarInfo, ignore_zeros=True
                ) as archive,
            ):
                yield from islice(Members(archive, self.url, self.label).entries(), skip, None)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            what = f"{error}: download it again, or leave it out"
            if compressed(self.url):
                what = "it is compressed, for all its name: unpack it to a plain .tar"
            raise UserError(f"{self.url}: {what}") from error


class Members:
    """The members of an open tar, grouped into samples as they come."""

    def __init__(self, archive: tarfile.TarFile, url: str, label: str) -> None:
        """Start at the first member."""
        self.archive, self.url, self.label = archive, url, label
        self.places: dict[str, tuple[int, int]] = {}
        """Where in the file each picture's content begins, and its size."""
        self.passed = Passed()

    def entries(self) -> Iterator[Item | Lost]:
        """Yield pictures, lost and refused members, then one line of what was passed over."""
        sample = Sample("")
        empty = True
        for member in self.archive:
            if member.isdir():
                continue
            empty = False
            path = PurePosixPath(member.name)
            if companion(path.as_posix()):
                self.passed.add(path.as_posix())
                continue
            name = (path.parent / path.name.partition(".")[0]).as_posix()
            if sample.name != name or sample.size > HELD_BYTES:
                cut = sample.name == name
                yield from sample.entries(self.label, self.passed)
                sample = Sample(name, cut=cut)
            self._add(sample, path.as_posix(), member)
        yield from sample.entries(self.label, self.passed)
        if empty:
            yield Lost(self.label, "an empty tar", image=False)
        elif words := self.passed.words():
            yield Lost(self.label, words, image=False)

    def _add(self, sample: Sample, name: str, member: tarfile.TarInfo) -> None:
        extension = extension_of(name)
        picture = extension in EXTENSIONS
        link = self._link(member) if picture and member.islnk() else None
        reason = refusal(member) or unread(name) if link is None else ""
        if picture and not reason and name in self.places:
            reason = "its name appears twice in the tar"
        if reason:
            lost = Lost(f"{self.label}/{plain(name)}", reason, picture or bool(unread(name)))
            sample.lost.append((len(sample.pictures), lost))
        elif picture:
            self.places[name] = link or (member.offset_data, member.size)
            content = self._content(member) if link is None else self._again(*link)
            sample.pictures.append((name, content))
        elif extension in (*CAPTIONS, LABEL):
            content = self._content(member)
            if extension in CAPTIONS and not is_text(content):
                lost = Lost(f"{self.label}/{plain(name)}", GARBLED, image=False)
                sample.lost.append((len(sample.pictures), lost))
            sample.texts.append(Text(name, extension, caption_of(content, extension)))
        else:
            self.passed.add(name)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        file = self.archive.extractfile(member)
        assert file is not None  # refusal() admits regular files alone
        return file.read()

    def _link(self, member: tarfile.TarInfo) -> tuple[int, int] | None:
        """Return the place of the picture that a hard link names; a stream has no way back."""
        place = self.places.get(PurePosixPath(member.linkname).as_posix())
        return None if "://" in self.url else place

    def _again(self, start: int, size: int) -> bytes:
        with open(self.url, "rb") as file:
            file.seek(start)
            return file.read(size)


def refusal(member: tarfile.TarInfo) -> str:
    """Return why a member is not read, or an empty string."""
    extension = extension_of(member.name)
    if member.islnk():
        return f"a hard link to {plain(member.linkname)}: its content stands there"
    if not member.isreg() or member.issparse():
        return "a link or special file"
    if member.name.startswith(("/", "\\")) or ".." in PurePosixPath(member.name).parts:
        return "its path leaves the folder"
    if extension in DANGEROUS:
        return f".{extension} files are not read"
    if extension in ARCHIVES or extension == "tar":
        return "an archive in a tar is not read: unpack it"
    limit = MAX_BYTES if extension in EXTENSIONS else CAPTION_BYTES
    if extension in (*EXTENSIONS, *CAPTIONS, LABEL) and member.size > limit:
        return f"{member.size} bytes; {limit} is the limit"
    return ""


def compressed(url: str) -> bool:
    """Whether a local file begins as gzip, bzip2, xz or Zstandard do; false of addresses."""
    if "://" in url:
        return False
    with open(url, "rb") as file:
        return file.read(6).startswith(MAGIC)


def open_tar(url: str) -> BinaryIO:
    """Open a local or remote tar for reading from front to end.

    Raises:
        UserError: If the package for its scheme is missing.
    """
    if "://" not in url:
        return open(url, "rb")
    try:
        return open_remote(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error


def tar_parts(urls: list[str]) -> tuple[list[TarPart], str]:
    """Return a part for each tar, and a fingerprint of their names and, where local, sizes.

    The parts' labels are the tars' names, with as many folders as it takes to tell them apart.

    Raises:
        UserError: If two tars are one.
    """
    paths = [PurePosixPath(url).parts for url in urls]
    for depth in range(1, max(map(len, paths)) + 1):
        labels = ["/".join(path[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    else:
        raise UserError("two of the tars are the same file: name it once")
    digest = hashlib.sha256()
    for url, label in zip(urls, labels):
        size = Path(url).stat().st_size if "://" not in url else ""
        digest.update(f"{plain(label)}\t{size}\n".encode())
    parts = [TarPart(url, plain(label)) for url, label in zip(urls, labels)]
    return parts, digest.hexdigest()
