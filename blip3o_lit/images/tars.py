"""Images of WebDataset tars, local or behind a URL, read in order and never unpacked to disk.

Neighbours whose names agree up to the first dot are a sample: a picture and, optionally, a caption
(txt, caption, json) and a label (cls: a class's name or number). Where a sample has several
pictures, as dates and version numbers in names make it, each of them is one of its own. Nothing else
is decoded, and what is passed over is counted.
"""

from __future__ import annotations

import glob
import hashlib
import os
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import aiohttp
import fsspec
from braceexpand import braceexpand

from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.remote import open_remote
from blip3o_lit.images.folder import CAPTION_BYTES, CAPTIONS, caption_of
from blip3o_lit.images.item import EXTENSIONS, MAX_BYTES, Item, Lost
from blip3o_lit.images.names import (
    ARCHIVES,
    Passed,
    companion,
    extension_of,
    plain,
    stem_of,
    unread,
)
from blip3o_lit.images.walk import is_token_store

SCHEMES = ("http", "https", "s3", "gs", "hf", "file")
DANGEROUS = ("pkl", "pickle", "pyd", "pth", "pt", "bin", "ckpt", "joblib", "so", "dll", "py", "sh")
"""Members that other tools would unpickle or run; here they are refused by name and counted."""
LABEL = "cls"
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
class Text:
    """A caption or label of a tar."""

    name: str
    extension: str
    content: str


@dataclass
class Sample:
    """Members that agree up to the first dot of their name, as they come."""

    name: str
    pictures: list[tuple[str, bytes]] = field(default_factory=list)
    """Names and contents."""
    texts: list[Text] = field(default_factory=list)
    lost: list[tuple[int, Lost]] = field(default_factory=list)
    """What is refused, and the number of pictures before it."""
    cut: bool = False
    """Whether earlier pictures of the same sample were handed on already."""

    @property
    def size(self) -> int:
        """Bytes that it holds."""
        pictures = sum(len(content) for _, content in self.pictures)
        return pictures + sum(len(text.content) for text in self.texts)

    def entries(self, label: str, passed: Passed) -> Iterator[Item | Lost]:
        """Yield its pictures and refused members in order; count texts that belong to none."""
        several = self.cut or len(self.pictures) > 1
        used: set[str] = set()
        for number, (name, content) in enumerate(self.pictures):
            yield from (lost for place, lost in self.lost if place == number)
            near = [text for text in self.texts if not several or self._near(text, name)]
            used |= {text.name for text in near}
            near.sort(key=lambda text: text.name.rpartition(".")[0] == self.name)  # its own first
            caption = next((t.content for t in near if t.extension != LABEL and t.content), "")
            classes = next((t.content for t in near if t.extension == LABEL and t.content), "")
            extra = {"label": classes} if classes else {}
            source = f"{label}/{plain(name)}"
            yield Item(source, partial(bytes, content), caption, extra=extra)
        yield from (lost for place, lost in self.lost if place == len(self.pictures))
        if self.pictures or self.cut or any(lost.image for _, lost in self.lost):
            for text in self.texts:
                if text.name not in used:
                    passed.add(text.name)
        elif self.texts:
            reason = "no picture of this name beside it; `tar --sort=name` keeps the two together"
            yield Lost(f"{label}/{plain(self.texts[0].name)}", reason)

    def _near(self, text: Text, picture: str) -> bool:
        """Whether a text is a picture's own, or that of the whole sample."""
        return stem_of(text.name) in (stem_of(picture), picture, self.name)


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
                yield from islice(_entries(archive, self.label), skip, None)
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            raise UserError(f"{self.url}: {error}: download it again, or leave it out") from error


def _entries(archive: tarfile.TarFile, label: str) -> Iterator[Item | Lost]:
    """Group members into samples; what was passed over comes in one line at the end."""
    sample = Sample("")
    names: set[str] = set()
    passed = Passed()
    empty = True
    for member in archive:
        if member.isdir():
            continue
        empty = False
        path = PurePosixPath(member.name)
        if companion(path.as_posix()):
            passed.add(path.as_posix())
            continue
        name = (path.parent / path.name.partition(".")[0]).as_posix()
        if sample.name != name or sample.size > HELD_BYTES:
            cut = sample.name == name
            yield from sample.entries(label, passed)
            sample = Sample(name, cut=cut)
        _add(sample, archive, member, label, names, passed)
    yield from sample.entries(label, passed)
    if empty:
        yield Lost(label, "an empty tar", image=False)
    elif words := passed.words():
        yield Lost(label, words, image=False)


def _add(
    sample: Sample,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    label: str,
    names: set[str],
    passed: Passed,
) -> None:
    name = PurePosixPath(member.name).as_posix()
    extension = extension_of(name)
    picture = extension in EXTENSIONS
    reason = refusal(member) or unread(name)
    if picture and not reason and name in names:
        reason = "its name appears twice in the tar"
    if reason:
        lost = Lost(f"{label}/{plain(name)}", reason, picture or bool(unread(name)))
        sample.lost.append((len(sample.pictures), lost))
    elif picture:
        names.add(name)
        sample.pictures.append((name, _content(archive, member)))
    elif extension in (*CAPTIONS, LABEL):
        text = caption_of(_content(archive, member), extension)
        sample.texts.append(Text(name, extension, text))
    else:
        passed.add(name)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # refusal() admits regular files alone
    return file.read()


def refusal(member: tarfile.TarInfo) -> str:
    """Return why a member is not read, or an empty string."""
    extension = extension_of(member.name)
    if member.islnk():
        return f"a hard link to {plain(member.linkname)}: the content stands there"
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


def tar_urls(words: str, out: Path | None = None) -> list[str]:
    """Expand braces and wildcards to paths and addresses.

    A wildcard passes over the shards of token stores, and of one that is being made in `out`.

    Raises:
        UserError: On `pipe:`, a scheme that is not listed, compressed tars, or no match.
    """
    if "://" not in words and os.path.isfile(words):
        urls = [words]
    else:
        try:
            urls = list(braceexpand(words))
        except ValueError as error:
            raise UserError(f"images={words}: the braces don't match") from error
    found: list[str] = []
    for url in urls:
        scheme, colon, _ = url.partition("://")
        if url.startswith("pipe:") or "::" in url:
            raise UserError(f"images={url}: pipes and chained addresses are not read")
        if colon:
            one_of("images' scheme", scheme, SCHEMES)
        if url.endswith((".gz", ".tgz", ".bz2", ".xz", ".zst")):
            raise UserError(f"images={url} is compressed: unpack it to a plain .tar")
        found += _matches(url, out)
    if len(set(found)) != len(found):
        raise UserError(f"images={words} names a tar twice")
    return found


def _matches(url: str, out: Path | None) -> list[str]:
    remote = "://" in url
    if "*" not in url or (not remote and os.path.isfile(url)):
        if not remote and not os.path.isfile(url):
            is_there = os.path.exists(url)
            raise UserError(f"images={url} {'is no file' if is_there else 'does not exist'}")
        return [url]
    if not remote:
        matches = _without_stores(url, sorted(glob.glob(_literal(url), recursive=True)), out)
    else:
        try:
            system, path = fsspec.url_to_fs(url)
            matches = sorted(system.unstrip_protocol(str(name)) for name in system.glob(path))
        except (ImportError, OSError) as error:
            raise UserError(f"images={url} can't be listed ({error})") from error
    if not matches:
        raise UserError(f"images={url} matches nothing")
    return matches


def _literal(words: str) -> str:
    """Take from a pattern all wildcards but `*`."""
    return words.replace("[", "[[]").replace("?", "[?]")


def _without_stores(words: str, matches: list[str], out: Path | None) -> list[str]:
    folders = {str(Path(match).parent) for match in matches}
    stores = {folder for folder in folders if is_token_store(Path(folder))}
    own = out.resolve() if out is not None else None
    if any(Path(folder).resolve() == own for folder in folders - stores):
        raise UserError(f"out={out} is a folder of images={words} itself: choose another")
    tars = [match for match in matches if str(Path(match).parent) not in stores]
    if matches and not tars:
        raise UserError(
            f"images={words} matches only shards of a token store, which are no pictures"
        )
    odd = next((match for match in tars if not Path(match).is_file()), None)
    if odd is not None:
        raise UserError(f"images={odd} is no file: move it away, or name the tars more narrowly")
    return tars


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
