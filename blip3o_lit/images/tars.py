"""Images of WebDataset tars, local or behind a URL, read in order and never unpacked to disk.

Members of one sample share a name up to the first dot: an image (jpg, jpeg, png, webp) and
optionally a caption (txt, caption, json) and a label (cls: a class's name or number). Nothing else
is decoded.
"""

from __future__ import annotations

import glob
import hashlib
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import aiohttp
import fsspec
from braceexpand import braceexpand

from blip3o_lit.config.errors import UserError, one_of
from blip3o_lit.config.remote import open_remote
from blip3o_lit.images.folder import CAPTION_BYTES, CAPTIONS, caption_of
from blip3o_lit.images.item import EXTENSIONS, MAX_BYTES, Item, Lost

SCHEMES = ("http", "https", "s3", "gs", "hf", "file")
DANGEROUS = ("pkl", "pickle", "pyd", "pth", "pt", "bin", "ckpt", "joblib", "so", "dll", "py", "sh")
"""Members that other tools would unpickle or run; here they are refused by name and counted."""
LABEL = "cls"
ATTEMPTS = 4
PAUSE = 1.0
"""Seconds before the second attempt at a remote tar; each further one waits twice as long."""


class StrictTarInfo(tarfile.TarInfo):
    """Headers that must be sound: by default a damaged one silently ends the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> StrictTarInfo:
        """Read the next header.

        Raises:
            tarfile.ReadError: On a damaged header, or an archive that stops without its end mark.
        """
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"damaged or cut off ({error})") from error


@dataclass
class Sample:
    """The members of one sample, as they come."""

    name: str
    source: str
    image: bytes | None = None
    """Empty where the sample is passed over."""
    caption: str = ""
    label: str = ""
    repeated: bool = False
    """Whether another sample of the tar has its name."""
    refused: list[Lost] = field(default_factory=list)

    def entries(self) -> list[Item | Lost]:
        """Return the sample's image, or what became of it, then its refused members."""
        if self.repeated:
            return [Lost(self.source, "its name appears twice in the tar"), *self.refused]
        if self.image is not None:
            image = self.image
            extra = {"label": self.label} if self.label else {}
            item = Item(self.source, partial(bytes, image), self.caption, extra=extra)
            return [item, *self.refused]
        if self.refused:
            return list(self.refused)
        return [Lost(self.source, f"no .{', .'.join(EXTENSIONS)} in this sample")]


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
                tarfile.open(fileobj=file, mode="r|", tarinfo=StrictTarInfo) as archive,
            ):
                yield from _samples(archive, self.label, skip)
        except (tarfile.TarError, EOFError) as error:
            raise UserError(f"{self.url}: {error}: download it again, or leave it out") from error


def _samples(archive: tarfile.TarFile, label: str, skip: int) -> Iterator[Item | Lost]:
    """Group members into samples; the first `skip` entries are passed over, most of them unread."""
    number = 0
    sample: Sample | None = None
    names: set[str] = set()
    for member in archive:
        if member.isdir():
            continue
        path = PurePosixPath(member.name)
        stem, _, suffixes = path.name.partition(".")
        name = (path.parent / stem).as_posix()
        if sample is None or sample.name != name:
            entries = sample.entries() if sample else []
            yield from entries[max(skip - number, 0) :]
            number += len(entries)
            sample = Sample(name, f"{label}/{name}", repeated=name in names)
            names.add(name)
        reason = refusal(member)
        extension = suffixes.lower().rpartition(".")[2]
        if reason:
            sample.refused.append(Lost(f"{label}/{member.name}", reason, image=False))
        elif extension in EXTENSIONS and sample.image is None:
            sample.source = f"{label}/{member.name}"
            sample.image = b"" if number < skip else _content(archive, member)
        elif extension in CAPTIONS and not sample.caption and number >= skip:
            sample.caption = caption_of(_content(archive, member), extension)
        elif extension == LABEL and number >= skip:
            sample.label = caption_of(_content(archive, member), extension)
    entries = sample.entries() if sample else []
    yield from entries[max(skip - number, 0) :]


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    assert file is not None  # refusal() admits regular files alone
    return file.read()


def refusal(member: tarfile.TarInfo) -> str:
    """Return why a member is not read, or an empty string."""
    extension = member.name.lower().rpartition(".")[2]
    if not member.isreg() or member.issparse():
        return "a link or special file"
    if member.name.startswith(("/", "\\")) or ".." in PurePosixPath(member.name).parts:
        return "its path leaves the folder"
    if extension in DANGEROUS:
        return f".{extension} files are not read"
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


def tar_urls(words: str) -> list[str]:
    """Expand braces and wildcards to paths and addresses.

    Raises:
        UserError: On `pipe:`, a scheme that is not listed, compressed tars, or no match.
    """
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
        found += _matches(url)
    if len(set(found)) != len(found):
        raise UserError(f"images={words} names a tar twice")
    return found


def _matches(url: str) -> list[str]:
    if "*" not in url:
        if "://" not in url and not Path(url).is_file():
            raise UserError(f"images={url} does not exist")
        return [url]
    if "://" not in url:
        matches = sorted(glob.glob(url, recursive=True))
    else:
        try:
            system, path = fsspec.url_to_fs(url)
            matches = sorted(system.unstrip_protocol(str(name)) for name in system.glob(path))
        except (ImportError, OSError) as error:
            raise UserError(f"images={url} can't be listed ({error})") from error
    if not matches:
        raise UserError(f"images={url} matches nothing")
    return matches


def tar_parts(urls: list[str]) -> tuple[list[TarPart], str]:
    """Return a part for each tar, and a fingerprint of their names and, where local, sizes.

    Raises:
        UserError: If two tars have the same name, which would make their samples' keys collide.
    """
    labels = [PurePosixPath(url).name for url in urls]
    if len(set(labels)) != len(labels):
        labels = ["/".join(PurePosixPath(url).parts[-2:]) for url in urls]
    if len(set(labels)) != len(labels):
        raise UserError("two of the tars have the same name and folder: rename one")
    digest = hashlib.sha256()
    for url, label in zip(urls, labels):
        size = Path(url).stat().st_size if "://" not in url else ""
        digest.update(f"{label}\t{size}\n".encode())
    parts = [TarPart(url, label) for url, label in zip(urls, labels)]
    return parts, digest.hexdigest()
