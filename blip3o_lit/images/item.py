"""A picture that is still to be read: its name, caption and split, and how to decode it safely."""

import hashlib
import io
import re
import stat
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from PIL import Image, features

from blip3o_lit.config.towers import PixelsConfig
from blip3o_lit.images.pixels import VIEWER, shown

_AVIF = features.check("avif")
EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"),
    *(["avif"] if _AVIF else []),
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", *(["AVIF"] if _AVIF else []))
"""Decoders that may run; PIL knows some fifty more, old and rarely fuzzed."""
MAX_PIXELS = 89_478_485
"""PIL's own warning limit."""
MAX_SIDE = 65_535
"""JPEG's own limit."""
MAX_RATIO = 100
"""Longest to shortest side: towers that resize the shortest to theirs make the other as long."""
MAX_BYTES = 256 * 2**20

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # MAX_PIXELS is stricter
warnings.filterwarnings("ignore", module=r"PIL\.", category=UserWarning)  # of damaged EXIF


class Reject(Exception):
    """An image that can't be used; the message is the reason that goes into rejects.jsonl."""


@dataclass(frozen=True)
class Item:
    """One image of a source."""

    source: str
    """Where it came from, in words that don't depend on the machine: `photos/cat.jpg`."""
    read: Callable[[], bytes | Image.Image]
    """Returns the file's bytes, or the picture itself where it is drawn; runs in a thread."""
    caption: str = ""
    split: str = ""
    """The split that the source gives; empty where we choose."""
    key: str = ""
    """The sample's key; made from `source` where the source has none of its own."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Goes into the sample's json."""
    further: tuple[str, ...] = ()
    """Its other captions, where it has several."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All its captions, none or several."""
        return tuple(text for text in (self.caption, *self.further) if text)

    @property
    def sample_key(self) -> str:
        """A key of letters, digits, `-` and `_`: the file's stem, and its hash."""
        if self.key:
            return self.key
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(self.source).name.split(".")[0])[:40]
        return f"{stem}-{hashlib.sha256(self.source.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Lost:
    """An entry of a source that is no image: a refused member, a line without a path."""

    source: str
    reason: str
    image: bool = True
    """Whether an image is lost with it; false for a refused member beside a sound image."""


def with_split(entry: Item | Lost, splits: dict[str, str]) -> Item | Lost:
    if isinstance(entry, Item) and entry.source in splits:
        return replace(entry, split=splits[entry.source])
    return entry


class Part(Protocol):
    """A piece of a source that is read in order, and whose order never changes."""

    @property
    def name(self) -> str: ...

    @property
    def split(self) -> str: ...  # of all its images, or an empty string

    @property
    def length(self) -> int | None: ...  # None: unknown before it is read

    def entries(self, skip: int = 0) -> Iterator[Item | Lost]:
        """Yield the entries from number `skip` on."""
        ...


@dataclass(frozen=True)
class ListPart:
    """A slice of a source whose items are all known: files, rows of a table, demo scenes."""

    name: str
    items: list[Item | Lost]
    split: str = ""

    @property
    def length(self) -> int:
        return len(self.items)

    def entries(self, skip: int = 0) -> Iterator[Item | Lost]:
        yield from self.items[skip:]


@dataclass(frozen=True)
class Source:
    """A named set of images."""

    name: str
    """The `images=` argument."""
    parts: list[Part]
    captions: bool = True
    """Whether its images may have captions."""
    split_rule: str = ""
    """How its own splits were made, in words; empty where it has none."""
    all_split: bool = False
    """Whether every image comes with its split."""
    fingerprint: str = ""
    """Changes when the images do: names and sizes of files, seeds of drawings."""
    classes: dict[str, list[str]] = field(default_factory=dict)
    """Prompts of the classes that its labels name, where it brings them."""
    beside: list[Lost] = field(default_factory=list)
    """What lies beside its images and is not read, in words."""

    @property
    def length(self) -> int | None:
        """Number of entries, where that is known without reading them."""
        lengths = [part.length for part in self.parts if part.length is not None]
        return sum(lengths) if len(lengths) == len(self.parts) else None


def slices(items: list[Item | Lost], size: int) -> list[Part]:
    """Cut a list into parts of `size`, each of one split where the source gives splits."""
    groups: dict[str, list[Item | Lost]] = {}
    for item in items:
        groups.setdefault(item.split if isinstance(item, Item) else "", []).append(item)
    parts: list[Part] = []
    for split, group in groups.items():
        for start in range(0, len(group), size):
            cut = group[start : start + size]
            name = f"{split or 'images'} {start} to {start + len(cut) - 1}"
            parts.append(ListPart(name, cut, split))
    return parts


def file_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """Read an image file, or another of at most `limit` bytes, or raise a Reject."""
    try:
        facts = path.stat()
        if stat.S_ISDIR(facts.st_mode):
            raise Reject("a folder, no file")
        if not stat.S_ISREG(facts.st_mode):  # reading a pipe would wait for ever
            raise Reject("no regular file")
        if facts.st_size > limit:
            raise Reject(f"file of {facts.st_size} bytes; {limit} is the limit")
        return path.read_bytes()
    except FileNotFoundError as error:
        link = path.is_symlink()
        raise Reject("a link to a missing file" if link else "file is missing") from error
    except OSError as error:
        raise Reject(f"can't be read ({error.strerror or type(error).__name__})") from error
    except ValueError as error:  # a NUL, or a character that no file name can hold
        raise Reject(f"no path of a file ({str(error).split(':')[0]})") from error


def decode(content: bytes | Image.Image, pixels: PixelsConfig = VIEWER) -> Image.Image:
    """Decode a picture to the RGB that a viewer shows, or raise a Reject."""
    try:
        if isinstance(content, Image.Image):
            return _checked(content, pixels)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return _checked(image, pixels)
    except (Reject, MemoryError):
        raise
    except Exception as error:  # PIL's decoders raise a dozen types on damaged input
        message = " ".join(str(error).split()) or type(error).__name__
        message = re.sub(r"<_io\.BytesIO object at 0x[0-9a-f]+>", "the file", message)
        raise Reject(message) from error


def _checked(image: Image.Image, pixels: PixelsConfig) -> Image.Image:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Reject(f"{width * height} pixels; {MAX_PIXELS} is the limit (decompression bomb)")
    if max(width, height) > min(MAX_SIDE, MAX_RATIO * min(width, height)):
        raise Reject(
            f"{width} x {height} pixels; {MAX_RATIO} to 1 and sides of {MAX_SIDE} are the limit"
        )
    return shown(image, pixels)
