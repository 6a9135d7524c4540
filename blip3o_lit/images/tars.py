"""Images of WebDataset tars, local or behind a URL, read in order and never unpacked to disk."""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

from blip3o_lit.base.remote import PAUSES, open_remote, resumed
from blip3o_lit.config.errors import UserError
from blip3o_lit.images.folder import CAPTION_BYTES, CAPTIONS, captions_of
from blip3o_lit.images.item import EXTENSIONS, MAX_BYTES, Item, Lost, with_split
from blip3o_lit.images.names import ARCHIVES, Passed, companion, extension_of, plain, unread
from blip3o_lit.images.sample import LABEL, Sample, Text
from blip3o_lit.images.text import GARBLED, is_text

DANGEROUS = ("pkl", "pickle", "pyd", "pth", "pt", "bin", "ckpt", "joblib", "so", "dll", "py", "sh")
"""Members that other tools would unpickle or run; here they are refused by name and counted."""
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
"""First bytes of gzip, bzip2, xz and Zstandard."""
HELD_BYTES = MAX_BYTES
"""A sample that holds more is handed on before its end."""


class StrictTarInfo(tarfile.TarInfo):
    """Headers that must be sound: by default a damaged one silently ends the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> StrictTarInfo:
        """Read the next header; after an end mark another tar may follow (`cat a.tar b.tar`)."""
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
    """One tar of a source, whose number of images is not known before it is read."""

    url: str
    """A path, or an address with one of `SCHEMES`."""
    name: str
    """Its name without the machine's folders."""
    splits: dict[str, str] = field(default_factory=dict)
    """Of the images that a file names."""
    split: str = ""
    length: None = None
    by_place: bool = False
    """Of a local tar: pictures are read when they are asked for, from their places in the file."""
    pauses: tuple[float, ...] = PAUSES
    """Seconds before a broken connection is opened again."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.url

    def entries(self, skip: int = 0) -> Iterator[Item | Lost]:
        for entry in resumed(self._read, self.url, skip, self.pauses):
            yield with_split(entry, self.splits)

    def _read(self, skip: int) -> Iterator[Item | Lost]:
        try:
            with (
                open_remote(self.url) if self.is_remote else open(self.url, "rb") as file,
                tarfile.open(
                    fileobj=file,
                    mode="r:" if self.by_place else "r|",
                    tarinfo=StrictTarInfo,
                    ignore_zeros=True,
                ) as archive,
            ):
                yield from islice(Members(archive, self).entries(), skip, None)
        except UserError:
            raise
        except OSError as error:
            if self.is_remote:  # `resumed` opens it again
                raise
            missing = isinstance(error, FileNotFoundError)
            reason = "it is not there" if missing else error
            raise UserError(f"{self.url} can't be read ({reason})") from error
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            what = f"{error}: download it again, or leave it out"
            if not self.is_remote and _is_compressed(self.url):
                what = "it is compressed, for all its name: unpack it to a plain .tar"
            raise UserError(f"{self.url}: {what}") from error


class Members:
    """The members of an open tar, grouped into samples as they come.

    Neighbours whose names agree up to the first dot are a sample: a picture and, optionally, a
    caption (txt, caption, json) and a label (cls). Where a sample has several pictures, as dates
    and version numbers in names make it, each of them is one of its own.
    """

    def __init__(self, archive: tarfile.TarFile, part: TarPart) -> None:
        self.archive, self.part = archive, part
        self.places: dict[str, tuple[int, int]] = {}
        """Where in the file each picture's content begins, and its size."""
        self.passed = Passed()

    def entries(self) -> Iterator[Item | Lost]:
        """Yield pictures, lost and refused members, then one line of what was passed over."""
        label = self.part.name
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
                yield from sample.entries(label, self.passed)
                sample = Sample(name, cut=sample.name == name)
            self._add(sample, path.as_posix(), member)
        yield from sample.entries(label, self.passed)
        if empty:
            yield Lost(label, "an empty tar", image=False)
        elif words := self.passed.words():
            yield Lost(label, words, image=False)

    def _add(self, sample: Sample, name: str, member: tarfile.TarInfo) -> None:
        extension = extension_of(name)
        picture = extension in EXTENSIONS
        link = self._link(member) if picture and member.islnk() else None
        reason = refusal(member) or unread(name) if link is None else ""
        if picture and not reason and name in self.places:
            reason = "its name appears twice in the tar"
        if reason:
            sample.lose(self._lost(name, reason, picture or bool(unread(name))))
        elif picture:
            place = self.places[name] = link or (member.offset_data, member.size)
            if link or self.part.by_place:
                read = partial(self._at, *place)
            else:
                read = partial(bytes, self._content(member))
            sample.pictures.append((name, read, place[1]))
        elif extension in (*CAPTIONS, LABEL):
            content = self._content(member)
            if extension in CAPTIONS and not is_text(content):
                sample.lose(self._lost(name, GARBLED, image=False))
            first, *further = captions_of(content, extension) or [""]
            sample.texts.append(Text(name, extension, first, tuple(further)))
        else:
            self.passed.add(name)

    def _lost(self, name: str, reason: str, image: bool) -> Lost:
        return Lost(f"{self.part.name}/{plain(name)}", reason, image)

    def _content(self, member: tarfile.TarInfo) -> bytes:
        file = self.archive.extractfile(member)
        assert file is not None  # refusal() admits regular files alone
        return file.read()

    def _link(self, member: tarfile.TarInfo) -> tuple[int, int] | None:
        """Return the place of the picture that a hard link names; a stream has no way back."""
        place = self.places.get(PurePosixPath(member.linkname).as_posix())
        return None if self.part.is_remote else place

    def _at(self, start: int, size: int) -> bytes:
        with open(self.part.url, "rb") as file:
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


def _is_compressed(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(6).startswith(MAGIC)


def tar_parts(urls: list[str]) -> tuple[list[TarPart], str]:
    """Return a part per tar, and a fingerprint of their names and, where local, sizes.

    The parts' names are the tars', with as many folders as it takes to tell them apart.
    """
    paths = [PurePosixPath(url).parts for url in urls]
    for depth in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    else:
        raise UserError("two of the tars are the same file: name it once")
    parts = [TarPart(url, plain(name)) for url, name in zip(urls, names)]
    digest = hashlib.sha256()
    for part in parts:
        size = "" if part.is_remote else Path(part.url).stat().st_size
        digest.update(f"{part.name}\t{size}\n".encode())
    return parts, digest.hexdigest()
