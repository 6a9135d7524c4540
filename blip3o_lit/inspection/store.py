"""Reads a whole token store and says what is in it and what is wrong with it; changes nothing.

Shape suffixes: B samples, N tokens, C channels.
"""

import hashlib
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing.thumbnail import opened
from blip3o_lit.inspection.finding import Finding
from blip3o_lit.inspection.numbers import ArrayNumbers, CaptionLengths
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.tokens.store.checksums import checksums_of
from blip3o_lit.tokens.store.heads import HEADS_FILE, Head
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex, repair_command
from blip3o_lit.tokens.store.int8 import dequantise, load_scales, scale_array
from blip3o_lit.tokens.store.mapped_shard import Shard
from blip3o_lit.tokens.store.sequences import faulty
from blip3o_lit.tokens.store.shards import unpack_offsets
from blip3o_lit.tokens.store.storage import TORCH_TYPES, finite

READ_SAMPLES = 16
NAMED = 5
"""Problems of one kind that are named one by one; the rest are counted."""


class Inspection:
    """Everything that one pass over a store collects: findings, and figures per array."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, TokenIndex.load(folder)
        self.findings: list[Finding] = []
        specs = self.index.arrays
        self.numbers = {
            name: ArrayNumbers(spec)
            for name, spec in specs.items()
            if spec.kind not in ("scale", "lengths")
        }
        self.lengths = {name: CaptionLengths() for name in self.index.sequences}
        self.condition = condition_of(self.index)
        self.samples = self.captions = 0
        self._problems: Counter[str] = Counter()
        self._keys: dict[bytes, str] = {}
        self._contents: dict[bytes, tuple[str, str]] = {}
        self._scales: dict[str, np.ndarray] = {}

    def note(self, level: str, what: str, says: str, fix: str = "") -> None:
        """Keep a problem; of one kind only the first few are named, all are counted."""
        self._problems[what] += 1
        if self._problems[what] <= NAMED:
            self.findings.append(Finding(level, what, says, fix))

    def run(self) -> None:
        try:
            self._scales = load_scales(self.folder, self.index.arrays)
        except UserError as error:
            self.note("fail", "scales", str(error))
        with Work("reading", self.index.samples, "samples") as work:
            for entry in self.index.shards:
                problem, crc32 = shard_problem(self.folder, entry)
                if not problem and entry.crc32 not in ("", crc32):
                    problem = f"{entry.file} is sound, its crc32 in index.json is of another file"
                try:
                    shard = Shard.by_headers(self.folder, entry, self.index)
                    self.offsets(shard)
                    self.read(shard)
                except UserError as error:
                    problem = problem or str(error)
                if problem:
                    repair = f"restore it, or {repair_command(self.folder)}"
                    self.note("fail", "shard", problem, repair)
                work.advance(entry.samples)
        self.conclude()

    def offsets(self, shard: Shard) -> None:
        entry = shard.entry
        path = self.folder / entry.offsets
        fix = f"delete {path}: it is made again when first used"
        if not path.is_file():
            self.note("warn", "offsets", f"{entry.offsets} is missing", "made when first used")
            return
        columns, content = self.index.columns, path.read_bytes()
        known = unpack_offsets(content, entry.samples, columns, entry.sha256)
        if known is None:
            self.note("warn", "offsets", f"{entry.offsets} is damaged or of another tar", fix)
        elif not np.array_equal(known, shard.offsets):
            self.note("fail", "offsets", f"{entry.offsets} points to wrong places", fix)

    def read(self, shard: Shard) -> None:
        self.check_lengths(shard)
        for first in range(0, shard.entry.samples, READ_SAMPLES):
            batch = range(first, min(first + READ_SAMPLES, shard.entry.samples))
            sound = [sample for sample in batch if self.sample(shard, sample)]
            if not sound:
                continue
            stored = {
                name: np.stack([shard.stored(name, spec, sample) for sample in sound])
                for name, spec in self.index.arrays.items()
                if spec.kind != "sequence"
            }
            for name in self.lengths:  # of several lengths, so one row of tokens
                spec = self.index.arrays[name]
                rows = [shard.stored(name, spec, sample) for sample in sound]
                stored[name] = np.concatenate(rows)[None]
            for name, numbers in self.numbers.items():
                values = self.values(name, stored)
                if values is not None and values.numel():
                    numbers.add(values)

    def check_lengths(self, shard: Shard) -> None:
        """Note the samples whose captions' lengths don't add up to what is stored."""
        for name, counted in self.lengths.items():
            lengths_SK = shard.stored_lengths(name)
            bad = faulty(lengths_SK, shard.positions(name), self.index.arrays[name].shape[0])
            for sample in np.flatnonzero(bad).tolist():
                self.note("fail", "lengths", *shard.lengths_fault(name, sample).rsplit(": ", 1))
            counted.add(lengths_SK[~bad])

    def values(self, name: str, stored: dict[str, np.ndarray]) -> Tensor | None:
        """Return an array's numbers as fp32; None where its int8 scales are lost."""
        dtype = self.index.arrays[name].dtype
        tensor = torch.from_numpy(stored[name]).view(TORCH_TYPES[dtype])
        if dtype != "int8":
            return tensor.float()
        if name not in self._scales:
            return None
        by_token = stored.get(scale_array(name))
        token_BN = None if by_token is None else torch.from_numpy(by_token)
        return dequantise(tensor, torch.from_numpy(self._scales[name]), token_BN).float()

    def sample(self, shard: Shard, sample: int) -> bool:
        """Check one sample's key, caption and content; False when a number is not finite."""
        key, file, split = shard.key(sample), shard.entry.file, shard.entry.split
        self.samples += 1
        before = self._keys.setdefault(digest(key.encode()), file)
        if before != file:
            self.note("warn", "duplicate key", f"{key} is in {before} and in {file}", "rename one")
        try:
            self.captions += bool(shard.metadata(sample).get("caption"))
        except UserError as error:
            self.note("fail", "metadata", str(error))
        if self.index.thumbnails:
            try:
                opened([shard.thumbnail(sample)], [key])
            except UserError as error:
                self.note("fail", "thumbnail", f"{error} (in {file})")
        sound = True
        for name, spec in self.index.arrays.items():
            stored = shard.stored(name, spec, sample)
            if not finite(stored, spec.dtype):
                sound = False
                says = f"sample {key} in {file}: {name} holds NaN or infinity"
                self.note("fail", "numbers", says, "extract it again")
            if name == self.condition:
                self.content(content_mark(shard, name, spec, sample), key, file, split)
        return sound

    def content(self, mark: bytes, key: str, file: str, split: str) -> None:
        here = f"{key} in {file}"
        other_split, place = self._contents.setdefault(mark, (split, here))
        if place == here:
            return
        if other_split != split:
            says = f"{place} ({other_split}) and {here} ({split}) hold the same tokens"
            self.note("fail", "split leakage", says, "deduplicate=true takes the training one out")
        else:
            says = f"{place} and {here} hold the same tokens"
            self.note("warn", "duplicate content", says, "deduplicate=true drops one of them")

    def conclude(self) -> None:
        """Add the findings that need all samples."""
        for what, count in self._problems.items():
            if count > NAMED:
                self.findings.append(Finding("warn", what, f"{count - NAMED} more like these"))
        index = self.index
        known = {shard.file for shard in index.shards}
        for path in sorted(self.folder.glob("*.tar")):
            if path.name not in known:
                says = f"{path.name} is not in index.json"
                self.findings.append(Finding("warn", "shard", says, "repair=true"))
        if self.samples != index.samples:
            says = f"{self.samples:,} can be read, index.json promises {index.samples:,}"
            self.note("fail", "samples", says, "repair=true drops what is lost")
        if len(index.splits) < 2:
            self.note("warn", "splits", f"only {', '.join(index.splits)}", "evaluation needs two")
        self.findings += [*self.heads(), *self.classes(), *self.summary()]
        for name, numbers in self.numbers.items():
            self.findings += numbers.findings(name)
        for name, counted in self.lengths.items():
            self.findings += counted.findings(name, index.arrays[name].shape[0])

    def heads(self) -> Iterator[Finding]:
        if not (self.folder / HEADS_FILE).is_file():
            return
        tokens = {name: s for name, s in self.index.arrays.items() if s.kind == "tokens"}
        for name, spec in tokens.items():
            try:
                head = Head.load(self.folder, name, spec.normed)
                width = head.projection_CP.shape[0]
            except UserError as error:
                yield Finding("warn", f"head of {name}", str(error))
                continue
            if width == spec.shape[1]:
                yield Finding("ok", f"head of {name}", f"{width} -> {head.width}")
            else:
                says = f"takes {width} channels, tokens have {spec.shape[1]}"
                yield Finding("fail", f"head of {name}", says, "extract again")

    def classes(self) -> Iterator[Finding]:
        try:
            classes = Classes.load(self.folder)
        except UserError as error:
            yield Finding("fail", "classes", str(error))
            return
        if classes is not None:
            says = f"{len(classes.names)} with prompts embedded by {classes.tower}"
            yield Finding("ok", "classes", says)

    def summary(self) -> Iterator[Finding]:
        index, total = self.index, sum(shard.bytes for shard in self.index.shards)
        splits = ", ".join(f"{count:,} {split}" for split, count in index.splits.items())
        yield Finding("ok", "samples", f"{index.samples:,} ({splits}), {index.rejects} rejected")
        size = f"{total / 1e9:.3f} GB, {total / index.samples / 1e6:.3f} MB per sample"
        yield Finding("ok", "size", f"{len(index.shards)} shards, {size}")
        share = self.captions / max(self.samples, 1)
        yield Finding("ok", "captions", f"{share:.1%} of the samples have one")
        thumbnails = "one per sample" if index.thumbnails else "none: pictures can't be drawn"
        yield Finding("ok", "thumbnails", thumbnails)
        yield Finding("ok", "split rule", index.split_rule or "not recorded")
        for name, spec in index.arrays.items():
            if spec.dtype == "int8":
                cost = "not recorded" if spec.cosine is None else f"{spec.cosine:.6f}"
                says = f"int8 with {spec.scale} scales, mean cosine to the true tokens {cost}"
                yield Finding("ok", f"storage of {name}", says)


def condition_of(index: TokenIndex) -> str:
    """Return the array whose patches tell samples apart; empty without tokens."""
    tokens = [name for name, spec in index.arrays.items() if spec.kind == "tokens"]
    return "eva" if "eva" in tokens else next(iter(tokens), "")


def content_mark(shard: Shard, name: str, spec: ArraySpec, sample: int) -> bytes:
    """Return the hash of a sample's stored patches."""
    patches = shard.stored(name, spec, sample)[int(spec.cls) :]
    return digest(np.ascontiguousarray(patches).data)


def shard_problem(folder: Path, entry: ShardEntry) -> tuple[str, str]:
    """Compare a tar's size and sha256 with the index.

    Returns:
        What is wrong, empty when both are right; and the tar's crc32, if it was read.
    """
    path = folder / entry.file
    try:
        facts = path.stat()
    except OSError as error:
        return f"{entry.file} ({entry.samples} samples) can't be read: {error.strerror}", ""
    if not stat.S_ISREG(facts.st_mode):
        return f"{entry.file} is no regular file", ""
    if facts.st_size != entry.bytes:
        return f"{entry.file} has {facts.st_size} bytes, index.json promises {entry.bytes}", ""
    sums = checksums_of(path)
    wrong = f"{entry.file} has another sha256 than index.json says: its content changed"
    return (wrong if sums.sha256 != entry.sha256 else ""), sums.crc32


def digest(content: bytes | memoryview) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def inspect(folder: Path) -> Inspection:
    """Read a whole store."""
    inspection = Inspection(folder)
    inspection.run()
    return inspection
