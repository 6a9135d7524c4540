"""The seeds' embedding files -> a token store: survey, split, copy, and go on after a kill.

A file is converted in parts of `PART_SAMPLES` rows. Each part closes its shards and then adds one
line to `.convert.jsonl` in the output folder; a second run skips what that journal holds, removes
what it does not hold, and ends in the same bytes as an undisturbed run.

Shape suffixes: b rows, N tokens, C width.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit.base.progress import Work
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.embeddings import LegacyFile
from blip3o_lit.seeds.journal import Journal, clear_unfinished
from blip3o_lit.seeds.split import Split
from blip3o_lit.seeds.survey import KEY_LENGTH, Survey, clean, key_digest, take_survey
from blip3o_lit.tokens.store.index import SCHEMA, ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.shards import ShardWriter
from blip3o_lit.tokens.store.storage import fit_int8, load_scales, save_scales, with_token_scales

PART_SAMPLES = 4096
BATCH_BYTES = 1 << 26
"""Bytes of fp32 tokens in memory at a time: 12 samples of the mission's pair."""
SAMPLE_OVERHEAD = 4096
"""Bytes of tar headers, padding and JSON beside a sample's numbers."""
SCALE_ROWS = 64
"""Rows whose tokens fix the scales of `storage=int8`; EVA's take 270 MB in fp32."""
SMALL = 20
"""Expected validation samples below which the split is made sure to hold one."""


def convert(config: ConvertConfig) -> TokenIndex:
    """Convert files and return the index of the finished store.

    Raises:
        UserError: On unsafe, damaged or contradictory input, a full disk, or a folder in use.
    """
    if config.source is None or config.out is None:
        raise UserError("convert needs source=PATH (the seeds' file or folder) and out=DIR")
    source, out = Path(config.source).expanduser(), Path(config.out).expanduser()
    finished = out / "index.json"
    try:
        if finished.exists() and not Journal.exists(out):
            raise UserError(f"out={out} holds a finished token store: choose another folder")
        survey = take_survey(source, config)
        with Journal.open(out, fingerprint(survey, config)) as journal:
            if not finished.exists():
                clear_unfinished(out, journal)
            if config.storage == "int8":
                survey = fit_scales(survey, config, out)
            if not finished.exists():
                check_space(out, survey, journal)
                copy(survey, config, out, journal)
            return finish(survey, config, out, journal)
    except OSError as error:
        raise UserError(
            f"{error.filename or out}: {error.strerror}; mend it and run the same line again, "
            "what is converted is kept"
        ) from error


def fingerprint(survey: Survey, config: ConvertConfig) -> dict[str, Any]:
    """Return what must be unchanged for an interrupted conversion to go on."""
    names = ("mode", "missing_cls", "split_rule", "validation_fraction", "seed", "shard_samples")
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in survey.files]
    options = {name: getattr(config, name) for name in (*names, "storage")}
    return {"schema": SCHEMA, "files": files, "options": options, "part": PART_SAMPLES}


def check_space(out: Path, survey: Survey, journal: Journal) -> None:
    """Refuse to start what the disk can't hold."""
    sample = sum(spec.nbytes for spec in survey.arrays.values()) + SAMPLE_OVERHEAD
    needed = (survey.total - journal.samples) * sample
    free = shutil.disk_usage(out).free
    if needed > free:
        raise UserError(
            f"out={out} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f} GB free: "
            "choose another disk with out=DIR"
        )


def copy(survey: Survey, config: ConvertConfig, out: Path, journal: Journal) -> None:
    """Convert every part that the journal lacks."""
    split = survey.split(config)
    if split.rule == "hash" and survey.total * split.fraction < SMALL:
        split.settle(list(condition_shares(survey, config, split)))
    with Work("converting", survey.total, "samples") as work:
        base = 0
        for number, (path, samples) in enumerate(zip(survey.files, survey.samples)):
            parts = [p for p in range(0, samples, PART_SAMPLES) if not journal.has(number, p)]
            left = sum(min(PART_SAMPLES, samples - part) for part in parts)
            work.skip(samples - left)
            if parts:
                with LegacyFile(path, config.mode) as legacy:
                    if legacy.samples != samples:
                        raise UserError(f"{path} changed while it was converted: start again")
                    for part in parts:
                        rows = range(part, min(part + PART_SAMPLES, samples))
                        job = Part(legacy, number, base, rows, survey, config, split, out)
                        journal.add(number, part, len(rows), *job.write(journal.counts(), work))
            base += samples


def condition_shares(survey: Survey, config: ConvertConfig, split: Split) -> Iterator[float]:
    """Yield every sample's `Split.share`; for stores that are small enough to be read twice."""
    for path, samples in zip(survey.files, survey.samples):
        with LegacyFile(path, config.mode) as legacy:
            for row in range(samples):
                yield split.share(legacy.sides["eva"].rows(row, row + 1)[0])


@dataclass
class Part:
    """A run of rows of one file, on the way into its own shards."""

    legacy: LegacyFile
    number: int
    base: int
    rows: range
    survey: Survey
    config: ConvertConfig
    split: Split
    out: Path

    def write(
        self, counts: dict[str, int], work: Work
    ) -> tuple[list[ShardEntry], list[dict[str, Any]]]:
        """Write the part's shards.

        Args:
            counts: Finished shards of each split so far; numbers go on from there.
            work: Told of every batch.

        Returns:
            The shards' entries and the rejected samples.
        """
        done: list[ShardEntry] = []
        rejects: list[dict[str, Any]] = []
        writers: dict[str, ShardWriter] = {}
        numbers = dict(counts)
        try:
            for row, arrays in self.samples(work):
                key = self.key(row)
                split = self.split(self.number, row, arrays["eva"])
                if split not in writers:
                    name = f"{split}-{numbers.get(split, 0):06d}"
                    writers[split] = ShardWriter(
                        self.out, name, split, self.survey.arrays, self.survey.scales
                    )
                    numbers[split] = numbers.get(split, 0) + 1
                try:
                    writers[split].add(key, arrays, self.metadata(row, key))
                except UserError as error:
                    place = {"file": self.legacy.path.name, "row": row, "key": key}
                    rejects.append({**place, "reason": str(error)})
                    if self.config.on_bad == "error":
                        raise UserError(
                            f"{self.legacy.path}, row {row}: {error}; or on_bad=reject drops it"
                        ) from error
                if len(writers[split]) == self.config.shard_samples:
                    done.append(writers.pop(split).close())
            for split in sorted(writers):
                writer = writers.pop(split)
                if len(writer):
                    done.append(writer.close())
                else:
                    writer.abort()
        except BaseException:
            for writer in writers.values():
                writer.abort()
            raise
        return done, rejects

    def samples(self, work: Work) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Yield each row with its `[N, C]` fp32 tokens, reading a batch at a time."""
        numbers = sum(side.shape.tokens * side.shape.width for side in self.legacy.sides.values())
        batch = max(1, BATCH_BYTES // (4 * numbers))
        for first in range(self.rows.start, self.rows.stop, batch):
            last = min(first + batch, self.rows.stop)
            blocks = {
                name: fit_cls(side.rows(first, last), side.shape.cls, self.survey.arrays[name].cls)
                for name, side in self.legacy.sides.items()
            }
            for row in range(first, last):
                yield row, {name: block[row - first] for name, block in blocks.items()}
            work.advance(last - first)

    def key(self, row: int) -> str:
        """Return the sample's key: the file's own where it is usable and unique."""
        own = self.legacy.keys[row]
        if not own:
            return f"sample_{self.base + row:08d}"
        key = clean(own)
        if key_digest(key) in self.survey.repeated or len(own) > KEY_LENGTH:
            key = f"{key}-{self.number:05d}-{row:08d}"
        return key

    def metadata(self, row: int, key: str) -> dict[str, Any]:
        """Return the content of KEY.json."""
        own = self.legacy.keys[row]
        entry = {
            "caption": plain(self.legacy.captions[row] or ""),
            "source": f"{self.legacy.path.name}:{row}",
        }
        return entry if own in (None, key) else {**entry, "original_key": plain(own)}


def fit_scales(survey: Survey, config: ConvertConfig, out: Path) -> Survey:
    """Measure int8's scales on rows spread over all files, and write them; a repeat gives the same.

    Raises:
        UserError: If none of these rows is finite.
    """
    starts = np.cumsum([0, *survey.samples])
    chosen = np.unique(np.linspace(0, survey.total - 1, SCALE_ROWS).astype(int))
    arrays: dict[str, ArraySpec] = {}
    scales: dict[str, np.ndarray] = {}
    for name, spec in survey.arrays.items():
        found = []
        for number, path in enumerate(survey.files):
            local = chosen[(chosen >= starts[number]) & (chosen < starts[number + 1])]
            if not local.size:
                continue
            with LegacyFile(path, config.mode) as legacy:
                side = legacy.sides[name]
                for row in (local - starts[number]).tolist():
                    tokens = fit_cls(side.rows(row, row + 1), side.shape.cls, spec.cls)
                    if np.isfinite(tokens).all():
                        found.append(tokens)
        if not found:
            raise UserError(f"{survey.files[0]}: no finite {name} tokens to fit int8 scales to")
        arrays[name], scales[name] = fit_int8(spec, np.concatenate(found))
    save_scales(out, scales)
    arrays = with_token_scales(arrays)
    return replace(survey, arrays=arrays, scales=load_scales(out, arrays))


def fit_cls(tokens_bNC: np.ndarray, has: bool, wants: bool) -> np.ndarray:
    """Drop token 0, put the mean token before the others, or leave the tokens as they are."""
    if has == wants:
        return tokens_bNC
    if has:
        return tokens_bNC[:, 1:]
    mean = tokens_bNC.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.concatenate([mean, tokens_bNC], axis=1)


def plain(text: str) -> str:
    """Return text that UTF-8 can hold: lone surrogates become question marks."""
    return text.encode("utf-8", "replace").decode()


def finish(survey: Survey, config: ConvertConfig, out: Path, journal: Journal) -> TokenIndex:
    """Write rejects.jsonl and index.json, then drop the journal."""
    if not journal.shards:
        raise UserError(f"{survey.files[0]}: no sample could be stored, see rejects above")
    rejects = journal.rejects + [{"reason": gap} for gap in survey.gaps]
    words = survey.split(config).words
    shards = sorted(journal.shards, key=lambda entry: entry.file)
    index = TokenIndex(survey.arrays, shards, survey.reduced, words, len(rejects))
    journal.write_rejects(rejects)
    index.write(out)
    journal.remove()
    return index
