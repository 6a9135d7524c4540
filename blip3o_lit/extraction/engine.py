"""Images -> token shards: one pass over a source, both towers, one shard a unit of work.

Kill it anywhere and run it again: finished units stay, the unit in progress is done anew, and the
store is byte-identical to that of an undisturbed run. Workers share nothing but the folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from blip3o_lit.base.launcher import is_task, number, tasks_of
from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction.classes import embed_classes, read_classes
from blip3o_lit.extraction.encoding import TowerSet
from blip3o_lit.extraction.pipeline import Pipeline
from blip3o_lit.extraction.scales import stored_arrays
from blip3o_lit.extraction.sorted_safetensors import sorted_safetensors
from blip3o_lit.extraction.units import Ledger, check_rejects
from blip3o_lit.images.item import Part, Source
from blip3o_lit.images.split import Splitter
from blip3o_lit.tokens.classes import CLASSES_FILE
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.towers.tower import Tower

REJECTS_AFTER = 1000
"""Images before which a high share of bad ones does not stop the run early."""


@dataclass(frozen=True)
class Outcome:
    """What one run of the engine did."""

    index: TokenIndex | None
    """None while units of other workers are missing."""
    images: int
    """Images that this run read; those of earlier runs are not counted."""
    seconds: float
    already: bool = False
    """Whether the store was complete before."""


class Extraction:
    """One extraction into one folder."""

    def __init__(
        self, source: Source, towers: Mapping[str, Tower], out: Path, config: ExtractConfig
    ) -> None:
        """Prepare the towers and open the folder.

        Args:
            source: The images.
            towers: By array name, condition first.
            out: Folder of the store.
            config: Storage, split, batches; `images` and `out` of it are not read.

        Raises:
            UserError: If the folder holds another store, or the towers don't fit the options.
        """
        engine = config.extract
        self.source, self.out, self.config = source, out, config
        self.worker, self.workers = worker_of(engine.shard)
        self.splitter = Splitter(config.split.by, config.split.fraction, config.split.seed)
        self.towers = TowerSet(
            towers,
            source.captions,
            "float16" if config.storage == "int8" else config.storage,
            config.store,
            device_of(engine.device),
            engine.compile,
            config.pixels.changes(),
        )
        self.classes = dict(source.classes)
        if config.classes:
            self.classes = read_classes(Path(config.classes).expanduser())
            target = self.towers.target
            if target.encode_text(["a"]) is None:
                raise UserError(f"classes={config.classes}: {target.info.name} has no text side")
        rules = [source.split_rule, "" if source.all_split else self.splitter.words]
        self.split_rule = "; else ".join(rule for rule in rules if rule)
        self.ledger = Ledger(out, source, self._recipe(), engine.shard_samples)

    def _recipe(self) -> dict[str, Any]:
        """Return all that decides the content of the store."""
        arrays = {name: spec.to_dict() for name, spec in self.towers.arrays.items()}
        return {
            "images": self.source.name,
            "content of images": self.source.fingerprint,
            "towers": {name: entry for name, entry in arrays.items() if name != "text"},
            "captions": arrays.get("text"),
            "classes": _digest(self.classes),
            "towers.pretrained": self.config.towers.pretrained,
            "storage": self.config.storage,
            "store": self.config.store,
            "split": asdict(self.config.split),
            "pixels": None if self.source.name == "demo" else asdict(self.config.pixels),
            "extract.shard_samples": self.config.extract.shard_samples,
            "extract.batch_size": self.config.extract.batch_size,
            "extract.compile": self.config.extract.compile,
        }

    def run(self) -> Outcome:
        """Do this worker's missing units, then finish the store if all are there.

        Raises:
            UserError: If too many images can't be read, or memory or disk run out.
        """
        began = time.perf_counter()
        if self.ledger.finished:
            return Outcome(TokenIndex.load(self.out), 0, 0.0, already=True)
        arrays, scales = stored_arrays(self.towers, self.source, self.config, self.ledger.state)
        pipeline = Pipeline(
            self.towers,
            self.ledger,
            self.splitter,
            self.config.extract,
            arrays,
            scales,
            self.config.pixels,
        )
        try:
            images = self._work(pipeline)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise UserError(
                    f"out={self.out}: the disk is full; free some, run it again"
                ) from error
            raise
        index = self.ledger.finish(
            arrays,
            self._files,
            self.split_rule,
            None if self.config.store == "full" else self.config.store,
            self.config.max_reject_fraction,
        )
        return Outcome(index, images, time.perf_counter() - began)

    def _files(self) -> dict[str, bytes]:
        """Return the store's small files beside index and shards, by name."""
        files = {"heads.safetensors": sorted_safetensors(*self.towers.heads())}
        classes = embed_classes(self.towers.target, self.classes) if self.classes else None
        if classes is not None:
            files[CLASSES_FILE] = sorted_safetensors(*classes.content())
        return files

    def _work(self, pipeline: Pipeline) -> int:
        """Run the pipeline with progress; returns the images read."""
        parts = list(enumerate(self.source.parts))[self.worker :: self.workers]
        done = {number: self.ledger.done(number) for number, _ in parts}
        records = [record for found in done.values() for record in found]
        before = seen = sum(record.seen for record in records)
        lost = [entry for record in records for entry in record.lost]
        images_read = sum(record.images for record in records)
        total = Total(parts, before)
        self._check_disk(total.images - before)
        written = 0
        with Work("extracting", total.images, "images") as work:
            work.skip(before)
            for images, record in pipeline.run(parts, done):
                work.advance(images, f"{written / 1e9:.2f} GB written")
                if record is None:
                    continue
                written += sum(shard.bytes for shard in record.shards)
                lost += record.lost
                seen, images_read = seen + record.seen, images_read + record.images
                work.total = total.after(record.last, seen)
                if seen >= REJECTS_AFTER:
                    given = max(images_read, self.source.length or 0)
                    rejects = sum(entry["image"] for entry in lost)
                    check_rejects(rejects, given, self.config.max_reject_fraction, lost)
            return work.done - before

    def _check_disk(self, images: int) -> None:
        needed = images * self.towers.sample_bytes
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise UserError(
                f"out={self.out} has {free / 1e9:.1f} GB free, the tokens of {images} images take "
                f"{needed / 1e9:.1f} GB: free some, choose another folder or store=grid_64"
            )


class Total:
    """How many images there are: known for lists, estimated from the tars read so far."""

    def __init__(self, parts: list[tuple[int, Part]], before: int) -> None:
        """Start from the known lengths; `before` images are done."""
        lengths = [part.length for _, part in parts]
        self.parts, self.finished = len(parts), 0
        self.known = None not in lengths
        self.images = max(sum(length or 0 for length in lengths), before)

    def after(self, last: bool, seen: int) -> int:
        """Return the total after a unit; `last` says that it ended its part."""
        self.finished += last
        if not self.known:
            self.images = max(seen, seen * self.parts // max(self.finished, 1))
        return self.images


def _digest(classes: dict[str, list[str]]) -> str | None:
    return hashlib.sha256(json.dumps(classes).encode()).hexdigest() if classes else None


def worker_of(shard: str | None) -> tuple[int, int]:
    """Return this process's number and the number of workers.

    Args:
        shard: `extract.shard=i/n`; None takes the variables of torchrun,
            then of a Slurm array, then of srun.

    Raises:
        UserError: If it is no i/n with 0 <= i < n, or the variables are none.
    """
    if shard is not None:
        found = re.fullmatch(r"(\d+)/(\d+)", shard)
        if not found or int(found[1]) >= int(found[2]):
            raise UserError(f"extract.shard={shard} must be i/n with i from 0 to n - 1")
        return int(found[1]), int(found[2])
    given = {name: text for name, text in os.environ.items() if text.strip()}
    worker, workers, names = 0, 1, "RANK WORLD_SIZE"
    if "RANK" in given and "WORLD_SIZE" in given:
        worker, workers = number(given, "RANK"), number(given, "WORLD_SIZE")
    elif "SLURM_ARRAY_TASK_ID" in given:
        names = "SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT"
        step = number(given, "SLURM_ARRAY_TASK_STEP") or 1
        past = number(given, "SLURM_ARRAY_TASK_ID") - number(given, "SLURM_ARRAY_TASK_MIN")
        worker, workers = past // step, number(given, "SLURM_ARRAY_TASK_COUNT") or 1
    elif is_task(given):
        names = "SLURM_PROCID SLURM_NTASKS"
        worker, workers = number(given, "SLURM_PROCID"), number(given, tasks_of(given))
    if not 0 <= worker < workers:
        raise UserError(
            f"{names} in the environment make this worker {worker} of {workers}: `unset {names}`, "
            "or give extract.shard=i/n"
        )
    return worker, workers


def device_of(device: str) -> str:
    """Return the torch device: `auto` takes this process's GPU, or the CPU where there is none.

    Raises:
        UserError: If it is no device, or a GPU is asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{number(os.environ, 'LOCAL_RANK')}"
    if device != "cpu" and not re.fullmatch(r"cuda:\d+", device):
        raise UserError(f"extract.device={device} is not auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"extract.device={device}: no GPU is visible; extract.device=cpu runs")
    return device


def extract(
    source: Source, towers: Mapping[str, Tower], out: Path, config: ExtractConfig
) -> Outcome:
    """Turn the images of a source into a token store; see `Extraction`."""
    return Extraction(source, towers, out, config).run()
