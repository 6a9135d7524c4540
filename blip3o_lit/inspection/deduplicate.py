"""Takes out of a store the samples whose tokens another sample has: what doctor reports.

Of copies in one split the first stays; of copies in training and a held-out split the held-out
one, so that scores stay comparable. Shards are written again under new names, and come into view
with the new index in a single step. What leaves is named in rejects.jsonl.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip3o_lit.base.files import write_synced
from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.store import condition_of, content_mark
from blip3o_lit.tokens.store.index import REJECTS_FILE, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.tokens.store.shards import ShardWriter

JOURNAL = ".deduplicate.json"
"""While it is there: the files of which the index lists all that stay."""


@dataclass(frozen=True)
class Deduplicated:
    """What left a store."""

    index: TokenIndex
    left: dict[str, int]
    """Samples by split."""
    rewritten: int
    """Shards that were written again or left as a whole."""

    def __str__(self) -> str:
        if not self.left:
            return f"all {self.index.samples:,} samples differ: nothing left"
        shards = "shard" if self.rewritten == 1 else "shards"
        counts = ", ".join(f"{count:,} of {split}" for split, count in sorted(self.left.items()))
        return (
            f"{sum(self.left.values()):,} samples left ({counts}), {self.index.samples:,} stay; "
            f"{self.rewritten} {shards} written again, rejects.jsonl names them"
        )


def deduplicate(folder: Path) -> Deduplicated:
    """Take copies out; started again after a kill, it goes on from a whole store."""
    index = TokenIndex.load(folder)
    if (folder / ".extract").exists():
        raise UserError(f"{folder} holds an unfinished append: repeat its line first")
    _clear(folder, index)
    copies = _copies(folder, index)
    left: Counter[str] = Counter()
    for number, samples in copies.items():
        left[index.shards[number].split] += len(samples)
    if not left:
        return Deduplicated(index, {}, 0)
    for split, count in left.items():
        if count == index.splits[split]:
            raise UserError(f"{folder}: every sample of {split} is a copy: no {split} would stay")
    names = _new_names(index, copies)
    old = [file for n in copies for file in (index.shards[n].file, index.shards[n].offsets)]
    new = [name + suffix for name in names.values() for suffix in (".tar", ".idx")]
    write_synced(folder / JOURNAL, json.dumps([*old, *new]).encode())
    shards: list[ShardEntry] = []
    gone: list[dict[str, Any]] = []
    with Work("writing", len(copies), "shards") as work:
        for number, entry in enumerate(index.shards):
            if number not in copies:
                shards.append(entry)
                continue
            written = _without(folder, index, entry, copies[number], names.get(number), gone)
            shards += [written] if written else []
            work.advance(1)
    _name_them(folder, gone)
    after = replace(index, shards=shards)
    after.write(folder)
    _clear(folder, after)
    return Deduplicated(after, dict(left), len(copies))


def _copies(folder: Path, index: TokenIndex) -> dict[int, dict[int, str]]:
    """Return by shard the samples that are copies, each with the one that stays."""
    name = condition_of(index)
    kept: dict[bytes, str] = {}
    copies: dict[int, dict[int, str]] = {}
    numbers = range(len(index.shards))
    with Work("comparing", index.samples, "samples") as work:
        # Held-out samples come first: theirs is the copy that stays.
        for number in sorted(numbers, key=lambda n: (index.shards[n].split == "train", n)):
            entry = index.shards[number]
            shard = Shard.open(folder, entry, index, "full")
            for sample in range(entry.samples):
                mark = content_mark(shard, name, index.arrays[name], sample)
                if mark in kept:
                    copies.setdefault(number, {})[sample] = kept[mark]
                else:
                    kept[mark] = f"{shard.key(sample)} ({entry.split})"
            work.advance(entry.samples)
    return dict(sorted(copies.items()))


def _new_names(index: TokenIndex, copies: dict[int, dict[int, str]]) -> dict[int, str]:
    """Return a name that no shard has for each shard that keeps samples."""
    taken = {shard.file for shard in index.shards}
    names: dict[int, str] = {}
    for number, samples in copies.items():
        entry = index.shards[number]
        if len(samples) == entry.samples:
            continue
        free: Iterator[str] = (f"{entry.split}-{n:06d}" for n in range(10**9))
        names[number] = next(name for name in free if f"{name}.tar" not in taken)
        taken.add(f"{names[number]}.tar")
    return names


def _without(
    folder: Path,
    index: TokenIndex,
    entry: ShardEntry,
    copies: dict[int, str],
    name: str | None,
    gone: list[dict[str, Any]],
) -> ShardEntry | None:
    """Write a shard again without some samples; None where none stays. `gone` gets their facts."""
    shard = Shard.open(folder, entry, index, "size")
    for sample, stays in copies.items():
        facts = shard.metadata(sample)
        source, reason = facts.get("source") or shard.key(sample), f"the same tokens as {stays}"
        line = {"source": source, "reason": reason, "image": False}
        gone.append(line | ({"content": facts["content"]} if "content" in facts else {}))
    if name is None:
        return None
    writer = ShardWriter(folder, name, entry.split, index.arrays, None, index.thumbnails)
    try:
        for sample in range(entry.samples):
            if sample not in copies:
                stored = {n: shard.stored(n, spec, sample) for n, spec in index.arrays.items()}
                jpeg = shard.thumbnail(sample) if index.thumbnails else None
                writer.add_stored(shard.key(sample), stored, shard.metadata(sample), jpeg)
        return writer.close()
    finally:
        writer.abort()


def _name_them(folder: Path, gone: list[dict[str, Any]]) -> None:
    file = folder / REJECTS_FILE
    before = file.read_text("utf-8").splitlines() if file.is_file() else []
    lines = dict.fromkeys([*before, *(json.dumps(line, sort_keys=True) for line in gone)])
    write_synced(file, "".join(f"{line}\n" for line in lines).encode())


def _clear(folder: Path, index: TokenIndex) -> None:
    """Remove the files of the journal that the index does not list, then the journal."""
    try:
        files = json.loads((folder / JOURNAL).read_bytes())
    except FileNotFoundError:
        return
    listed = {file for shard in index.shards for file in (shard.file, shard.offsets)}
    for file in files:
        if file not in listed:
            (folder / file).unlink(missing_ok=True)
    (folder / JOURNAL).unlink()
