"""The pictures of a source by split, in the shards that an extraction of them would make.

Splits by content need every picture decoded once, and so does the list of those that can't be. What
that pass finds is kept in the cache folder, one character a picture.
"""

import hashlib
import json
import string
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from blip3o_lit.base.files import one_at_a_time, write_json
from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.home import home
from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import SplitConfig
from blip3o_lit.config.towers import PixelsConfig
from blip3o_lit.images.item import Item, ListPart, Lost, Reject, Source, decode
from blip3o_lit.images.split import Splitter
from blip3o_lit.images.tars import TarPart
from blip3o_lit.tokens.reading.loader import ordered
from blip3o_lit.tokens.store.index import split_rank

VERSION = 1
LOST = "-"
LETTERS = string.ascii_letters + string.digits
"""One for each split, in the order in which they are met."""
AHEAD = 64
MOST_LOST = 0.1
"""Share of pictures that may be unreadable, as in an extraction."""


@dataclass(frozen=True)
class PictureShard:
    """The pictures of one split in one part of a source."""

    split: str
    items: list[Item]
    part: int
    """Number of the part."""

    def key(self, sample: int) -> str:
        return self.items[sample].sample_key

    def metadata(self, sample: int) -> dict[str, Any]:
        item = self.items[sample]
        return {"caption": item.caption, "source": item.source, **item.extra}


class Listing:
    """What every entry of a source is: of a split, or lost."""

    def __init__(self, source: Source, split: SplitConfig, pixels: PixelsConfig, size: int) -> None:
        """List a source whose shards have `size` entries at most, before they are split."""
        self.source, self.split, self.pixels = source, split, pixels
        self.parts: list[ListPart] = []
        """A shard of each split that occurs in it becomes of each, as an extraction cuts them."""
        for part in source.parts:
            if isinstance(part, TarPart):
                if part.is_remote:
                    raise UserError(
                        f"data.images={source.name}: {part.url} is behind an address, where no "
                        "picture is read out of order: copy it, or extract a token store"
                    )
                part = replace(part, by_place=True)
            entries = list(part.entries())
            starts = range(0, len(entries), size)
            cuts = ((f"{part.name} {i}", entries[i : i + size]) for i in starts)
            self.parts += [ListPart(name, cut, part.split) for name, cut in cuts]
        rule = [split.by, split.fraction, split.seed, asdict(pixels), VERSION]
        text = json.dumps([source.fingerprint, source.name == "demo", rule])
        self.hash = hashlib.sha256(text.encode()).hexdigest()
        self.file = home() / "pictures" / f"{self.hash[:32]}.json"

    @property
    def images(self) -> int:
        """Pictures, unreadable ones included."""
        return sum(
            isinstance(entry, Item) or entry.image for part in self.parts for entry in part.items
        )

    def shards(self, threads: int, ranks: FirstRank = ALONE) -> list[PictureShard]:
        """Return the shards in the order of an extraction's index; the first rank looks."""
        names: list[str]
        names, codes = ranks.finds(lambda: list(self._known(threads)))
        if [len(code) for code in codes] != [part.length for part in self.parts]:
            raise UserError(f"data.images={self.source.name}: this rank sees other images there")
        shards = []
        for split in sorted(names, key=split_rank):
            letter = LETTERS[names.index(split)]
            for number, (part, code) in enumerate(zip(self.parts, codes)):
                pairs = zip(part.items, code)
                items = [e for e, c in pairs if c == letter and isinstance(e, Item)]
                if items:
                    shards.append(PictureShard(split, items, number))
        if not shards:
            raise UserError(f"data.images={self.source.name}: no image could be used")
        return shards

    def _known(self, threads: int) -> tuple[list[str], list[str]]:
        """Return the splits' names, and a text of letters for each part; looks once."""
        if not self.file.is_file():
            with one_at_a_time(self.file, required=False):  # Of all ranks one looks.
                if not self.file.is_file():
                    write_json(self.file, self._looked_at(threads))
        try:
            data = json.loads(self.file.read_bytes())
            names, codes = list(data["names"]), list(data["codes"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.file} is damaged: delete it, it is made again") from error
        if [len(code) for code in codes] != [part.length for part in self.parts]:
            raise UserError(f"{self.file} is of other images: delete it, it is made again")
        return names, codes

    def _looked_at(self, threads: int) -> dict[str, Any]:
        splitter = Splitter(self.split.by, self.split.fraction, self.split.seed)

        def look(entry: Item | Lost) -> tuple[str, str]:
            """Return an entry's split, or why it is lost."""
            if isinstance(entry, Lost):
                return "", f"{entry.source}: {entry.reason}" if entry.image else ""
            try:
                image = decode(entry.read(), self.pixels)
            except Reject as error:
                return "", f"{entry.source}: {error}"
            return entry.split or splitter(image), ""

        names: list[str] = []
        codes: list[str] = []
        lost: list[str] = []
        pool = ThreadPoolExecutor(threads, "decode")
        try:
            flat: Iterator[Item | Lost] = (e for part in self.parts for e in part.items)
            found = ordered(pool, look, flat, AHEAD)
            with Work("looking at", self.images, "images") as work:
                for part in self.parts:
                    code = ""
                    for _ in part.items:
                        split, reason = next(found)
                        lost += [reason] if reason else []
                        if split and split not in names:
                            names.append(split)
                        code += LETTERS[names.index(split)] if split else LOST
                        work.advance(1)
                    codes.append(code)
        finally:
            pool.shutdown(cancel_futures=True)
        if len(lost) > MOST_LOST * self.images:
            raise UserError(
                f"data.images={self.source.name}: {len(lost)} of {self.images} images can't be "
                f"read; the first is {lost[0]}"
            )
        return {"names": names, "codes": codes, "lost": lost}
