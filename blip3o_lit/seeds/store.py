"""The seeds' embedding files -> a token store: survey, split, copy, and go on after a kill.

A file is converted in parts, as many rows as `PART_SHARDS` shards hold. Each part closes its shards
and is then noted in the journal; a second run goes on behind the last such part, to the bytes of an
undisturbed run.

Shape suffixes: S samples, N tokens, C width.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit.base.files import check_disk, claimed, write_synced
from blip3o_lit.base.progress import Work
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.embeddings import LegacyFile
from blip3o_lit.seeds.journal import NAME, Journal
from blip3o_lit.seeds.split import Split
from blip3o_lit.seeds.survey import KEY_LENGTH, Survey, clean, take_survey
from blip3o_lit.tokens.store.index import REJECTS_FILE, SCHEMA, ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.int8 import fit_int8, load_scales, save_scales, with_token_scales
from blip3o_lit.tokens.store.shards import ShardWriter

PART_SHARDS = 16
BATCH_BYTES = 1 << 26
"""Bytes of fp32 tokens in memory at a time."""
SAMPLE_OVERHEAD = 4096
"""Bytes of tar headers, padding and JSON beside a sample's numbers."""
SCALE_ROWS = 64
"""Rows whose tokens fix the scales of `storage=int8`; in memory together, in fp32."""
SMALL = 20
"""Expected validation samples below which the split is made sure to hold one."""


def convert(config: ConvertConfig) -> TokenIndex:
    """Convert files and return the index of the finished store."""
    if config.source is None or config.out is None:
        raise UserError("convert needs source=PATH (the seeds' file or folder) and out=DIR")
    source, out = Path(config.source).expanduser(), Path(config.out).expanduser()
    try:
        if (out / "index.json").exists() and not (out / NAME).exists():
            raise UserError(f"out={out} holds a finished token store: choose another folder")
        survey = take_survey(source, config)
        with claimed(out, "out"):
            conversion = Conversion(survey, config, out)
            conversion.copy()
            return conversion.finish()
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror}; mend it and run the same line again, "
            "what is converted is kept"
        ) from error


class Conversion:
    """One conversion into one folder, which is this process's alone."""

    def __init__(self, survey: Survey, config: ConvertConfig, out: Path) -> None:
        self.survey, self.config, self.out = survey, config, out
        self.arrays, self.scales = survey.arrays, {}
        self.split = Split(survey.samples, math.prod(survey.arrays["eva"].grid), config)
        self.journal = Journal.open(out, self.fingerprint())
        if config.storage == "int8":
            self.fit_scales()

    def fingerprint(self) -> dict[str, Any]:
        """Return what must be unchanged for an interrupted conversion to go on."""
        ignored = ("source", "out", "on_bad")
        options = {k: v for k, v in asdict(self.config).items() if k not in ignored}
        facts = [(path.name, path.stat()) for path in self.survey.files]
        files = [[name, fact.st_size, fact.st_mtime_ns] for name, fact in facts]
        return {"schema": SCHEMA, "files": files, "options": options, "part": PART_SHARDS}

    def fit_scales(self) -> None:
        """Measure int8's scales on rows spread over all files; a repeat gives the same."""
        last = sum(self.survey.samples) - 1
        tokens: dict[str, list[np.ndarray]] = {name: [] for name in self.arrays}
        for sample in self.some(np.unique(np.linspace(0, last, SCALE_ROWS).astype(int))):
            for name, tokens_1NC in sample.items():
                if np.isfinite(tokens_1NC).all():
                    tokens[name].append(tokens_1NC)
        arrays: dict[str, ArraySpec] = {}
        scales: dict[str, np.ndarray] = {}
        for name, spec in self.arrays.items():
            if not tokens[name]:
                first = self.survey.files[0]
                raise UserError(f"{first}: no finite {name} tokens to fit int8 scales to")
            arrays[name], scales[name] = fit_int8(spec, np.concatenate(tokens[name]))
        save_scales(self.out, scales)
        self.arrays = with_token_scales(arrays)
        self.scales = load_scales(self.out, self.arrays)

    def some(self, numbers: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """Yield the tokens `[1, N, C]` of samples by their numbers over all files."""
        start = 0
        for path, samples in zip(self.survey.files, self.survey.samples):
            rows = numbers[(numbers >= start) & (numbers < start + samples)] - start
            start += samples
            if rows.size:
                legacy = LegacyFile(path, self.config.mode)
                for row in rows.tolist():
                    yield self.read(legacy, row, row + 1)
                del legacy  # before the next is opened

    def read(self, legacy: LegacyFile, first: int, last: int) -> dict[str, np.ndarray]:
        """Return the tokens `[S, N, C]` of rows as fp32, with CLS tokens as they are stored."""
        return {
            name: fit_cls(side.rows(first, last), side.shape.cls, self.arrays[name].cls)
            for name, side in legacy.sides.items()
        }

    def copy(self) -> None:
        """Convert every part that the journal lacks."""
        survey, done = self.survey, self.journal.samples
        total = sum(survey.samples)
        self.check_space(total - done)
        if self.split.by_content and total * self.config.validation_fraction < SMALL:
            self.split.settle([self.split.share(s["eva"][0]) for s in self.some(np.arange(total))])
        with Work("converting", total, "samples") as work:
            work.skip(done)
            start = 0
            for number, samples in enumerate(survey.samples):
                if done < start + samples:
                    self.copy_file(number, start, max(done - start, 0), work)
                start += samples

    def check_space(self, samples: int) -> None:
        sample_bytes = sum(spec.nbytes for spec in self.arrays.values()) + SAMPLE_OVERHEAD
        fix = "choose another disk with out=DIR"
        check_disk(self.out, samples * sample_bytes, f"{samples} samples need", fix)

    def copy_file(self, number: int, start: int, first: int, work: Work) -> None:
        """Convert a file from row `first` on; `start` is its first sample's number among all."""
        legacy = LegacyFile(self.survey.files[number], self.config.mode)
        if legacy.samples != self.survey.samples[number]:
            raise UserError(f"{legacy.path} changed while it was converted: start again")
        part = PART_SHARDS * self.config.shard_samples
        for row in range(first, legacy.samples, part):
            rows = range(row, min(row + part, legacy.samples))
            shards, rejects = self.copy_part(legacy, number, start, rows, work)
            self.journal.add(len(rows), shards, rejects)

    def copy_part(
        self, legacy: LegacyFile, number: int, start: int, rows: range, work: Work
    ) -> tuple[list[ShardEntry], list[dict[str, Any]]]:
        """Write rows of a file into shards of their own; return these and the rejected rows."""
        shards: list[ShardEntry] = []
        rejects: list[dict[str, Any]] = []
        writers: dict[str, ShardWriter] = {}
        try:
            for row, tokens in self.samples(legacy, rows, work):
                split = self.split(number, row, tokens["eva"])
                if split not in writers:
                    writers[split] = self.new_shard(split, shards)
                key = self.key(legacy, number, start, row)
                try:
                    writers[split].add(key, tokens, metadata(legacy, row, key))
                except UserError as error:
                    if self.config.on_bad == "error":
                        raise UserError(
                            f"{legacy.path}, row {row}: {error}; or on_bad=reject drops it"
                        ) from error
                    place = {"file": legacy.path.name, "row": row, "key": key}
                    rejects.append({**place, "reason": str(error)})
                if len(writers[split]) == self.config.shard_samples:
                    shards.append(writers.pop(split).close())
            for split in sorted(writers):
                if len(writers[split]):
                    shards.append(writers.pop(split).close())
        finally:
            for writer in writers.values():
                writer.abort()
        return shards, rejects

    def samples(
        self, legacy: LegacyFile, rows: range, work: Work
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield each row with its `[N, C]` fp32 tokens, reading a batch at a time."""
        numbers = sum(side.shape.tokens * side.shape.width for side in legacy.sides.values())
        batch = max(1, BATCH_BYTES // (4 * numbers))
        for first in range(rows.start, rows.stop, batch):
            last = min(first + batch, rows.stop)
            blocks = self.read(legacy, first, last)
            for row in range(first, last):
                yield row, {name: block_SNC[row - first] for name, block_SNC in blocks.items()}
            work.advance(last - first)

    def new_shard(self, split: str, shards: list[ShardEntry]) -> ShardWriter:
        """Start the shard of a split behind those of the journal and of this part."""
        number = sum(shard.split == split for shard in [*self.journal.shards, *shards])
        return ShardWriter(self.out, f"{split}-{number:06d}", split, self.arrays, self.scales)

    def key(self, legacy: LegacyFile, number: int, start: int, row: int) -> str:
        """Return the sample's key: the file's own where it is usable and unique."""
        own = legacy.keys[row]
        if not own:
            return f"sample_{start + row:08d}"
        key = clean(own)
        if key in self.survey.repeated or len(own) > KEY_LENGTH:
            key = f"{key}-{number:05d}-{row:08d}"
        return key

    def finish(self) -> TokenIndex:
        """Write rejects.jsonl and index.json, then drop the journal."""
        journal, survey = self.journal, self.survey
        if not journal.shards:
            raise UserError(f"{survey.files[0]}: no sample could be stored, see rejects above")
        rejects = journal.rejects + [{"reason": gap} for gap in survey.gaps]
        shards = sorted(journal.shards, key=lambda entry: entry.file)
        index = TokenIndex(self.arrays, shards, survey.reduced, self.split.words, len(rejects))
        if rejects:
            lines = [json.dumps(reject).encode() + b"\n" for reject in rejects]
            write_synced(self.out / REJECTS_FILE, lines)
        index.write(self.out)
        journal.path.unlink()
        return index


def metadata(legacy: LegacyFile, row: int, key: str) -> dict[str, Any]:
    own = legacy.keys[row]
    entry = {
        "caption": plain(legacy.captions[row] or ""),
        "source": f"{legacy.path.name}:{row}",
    }
    return entry if own in (None, key) else {**entry, "original_key": plain(own)}


def fit_cls(tokens_SNC: np.ndarray, has: bool, wants: bool) -> np.ndarray:
    """Drop token 0, put the mean token before the others, or leave the tokens as they are."""
    if has == wants:
        return tokens_SNC
    if has:
        return tokens_SNC[:, 1:]
    mean = tokens_SNC.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.concatenate([mean, tokens_SNC], axis=1)


def plain(text: str) -> str:
    """Return text that UTF-8 can hold: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode()
