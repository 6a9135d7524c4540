"""Images -> token shards: one pass over a source, both towers, one shard per unit of work.

Kill it anywhere and run it again: finished units stay, the unit in progress is done anew, and the
store is byte-identical to that of an undisturbed run. Workers share nothing but the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from blip3o_lit.base.files import check_disk, room_on_disk, write_synced
from blip3o_lit.base.launcher import is_task, number, tasks_of
from blip3o_lit.base.progress import Work
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction.append import RECIPE_FILE, OldStore
from blip3o_lit.extraction.classes import embed_classes, read_classes
from blip3o_lit.extraction.encoding import TEXT, TowerSet
from blip3o_lit.extraction.pipeline import Pipeline
from blip3o_lit.extraction.scales import stored_arrays
from blip3o_lit.extraction.units import Ledger, UnitRecord, check_rejects
from blip3o_lit.images.item import Source
from blip3o_lit.images.split import Splitter
from blip3o_lit.tokens.classes import CLASSES_FILE
from blip3o_lit.tokens.store.heads import HEADS_FILE
from blip3o_lit.tokens.store.index import REJECTS_FILE, ArraySpec, TokenIndex, split_rank
from blip3o_lit.tokens.store.int8 import SCALES_FILE
from blip3o_lit.towers.text_tower import TextTower
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
    added: int = 0
    """Samples that an append brought."""


class Extraction:
    """One extraction of a source into one folder; towers by array name, condition first."""

    def __init__(
        self,
        source: Source,
        towers: Mapping[str, Tower],
        out: Path,
        config: ExtractConfig,
        words: TextTower | None = None,
        key: str = "out",
    ) -> None:
        """Prepare the towers and open the folder; `images` and `out` of `config` are not read.

        Towers on the meta device tell what they would store. `words` is the tower whose states of
        the captions are kept, where they are; `key` is the override of the folder.
        """
        engine = config.extract
        self.source, self.out, self.config = source, out, config
        self.worker, self.workers = worker_of(engine.shard)
        grows = config.append and (out / "index.json").exists()
        self.old = OldStore(out) if grows else None
        self.splitter = Splitter(config.split.by, config.split.fraction, config.split.seed)
        self.words = words
        self.towers = self.tower_set(towers)
        if self.old is not None:
            self.old.check(self.towers, config)
        self.classes = dict(source.classes)
        if config.classes:
            self.classes = read_classes(Path(config.classes).expanduser())
            target = self.towers.target
            if target.encode_text(["a"]) is None:
                raise UserError(f"classes={config.classes}: {target.info.name} has no text side")
        rules = [source.split_rule, "" if source.all_split else self.splitter.words]
        self.split_rule = "; else ".join(rule for rule in rules if rule)
        self.ledger = Ledger(out, source, self._recipe(), engine.shard_samples, self.old, key)

    def tower_set(self, towers: Mapping[str, Tower]) -> TowerSet:
        """Return both towers as they encode for this store."""
        config = self.config
        meta = all(tower.device.type == "meta" for tower in towers.values())
        return TowerSet(
            towers,
            self.source.captions if self.old is None else TEXT in self.old.arrays,
            "float16" if config.storage == "int8" else config.storage,
            config.store,
            "meta" if meta else device_of(config.extract.device),
            config.extract.compile,
            config.pixels.changes(),
            config.thumbnails,
            self.words,
            config.captions,
        )

    def _recipe(self) -> dict[str, Any]:
        """Return all that decides the content of the store."""
        arrays = {name: spec.to_dict() for name, spec in self.towers.arrays.items()}
        captions = arrays.pop(TEXT, None)
        prompts = json.dumps(self.classes).encode()
        appended = {} if self.old is None else {"append to": self.old.index.hash}
        return {
            **appended,
            "images": self.source.name,
            "content of images": self.source.fingerprint,
            "towers": arrays,
            "captions": captions,
            "classes": hashlib.sha256(prompts).hexdigest() if self.classes else None,
            "towers.pretrained": self.config.towers.pretrained,
            "storage": self.config.storage,
            "store": self.config.store,
            # None, as in stores that are older than thumbnails.
            "thumbnails": self.config.thumbnails or None,
            "split": asdict(self.config.split),
            "pixels": None if self.source.name == "demo" else asdict(self.config.pixels),
            "extract.shard_samples": self.config.extract.shard_samples,
            "extract.batch_size": self.config.extract.batch_size,
            "extract.compile": self.config.extract.compile,
        }

    def run(self) -> Outcome:
        """Do this worker's missing units, then finish the store if all are there."""
        began = time.perf_counter()
        if self.ledger.finished:
            return Outcome(TokenIndex.load(self.out), 0, 0.0, already=True)
        with room_on_disk(f"{self.ledger.key}={self.out}"):
            pipeline = self.pipeline()
            images = self._work(pipeline)
            index = self.finish(pipeline.arrays)
        added = index.samples - self.old.index.samples if self.old and index else 0
        return Outcome(index, images, time.perf_counter() - began, added=added)

    def pipeline(self) -> Pipeline:
        """Return what does the work, with the scales of int8 measured and the old store read."""
        towers, ledger, config = self.towers, self.ledger, self.config
        held = None
        if self.old is None:
            arrays, scales = stored_arrays(towers, self.source, config, ledger.state)
        else:
            arrays, scales, held = self.old.arrays, self.old.scales(), self.old.held()
        return Pipeline(towers, ledger, self.splitter, config, arrays, scales, held)

    def finish(self, arrays: dict[str, ArraySpec]) -> TokenIndex | None:
        """Write the store's other files, its index last; None while units are missing."""
        return self.ledger.finish(partial(self._write_store, arrays))

    def _work(self, pipeline: Pipeline) -> int:
        """Run the pipeline with progress; returns the images read."""
        parts = list(enumerate(self.source.parts))[self.worker :: self.workers]
        done = {number: self.ledger.done(number) for number, _ in parts}
        so_far = UnitRecord(0, last=False)
        finished = 0
        for record in chain.from_iterable(done.values()):
            so_far.add(record)
            finished += record.last
        before = so_far.seen
        lengths = [part.length for _, part in parts]
        total = max(sum(length or 0 for length in lengths), before)
        what = f"the tokens of {total - before} images take"
        fix = "free some, choose another folder or store=grid_64"
        if self.old is None:  # how many pictures of an append are new is not known yet
            needed = (total - before) * self.towers.sample_bytes
            check_disk(self.out, needed, what, fix, self.ledger.key)
        written = 0
        with Work("extracting", total, "images") as work:
            work.skip(before)
            for images, record in pipeline.run(parts, done):
                work.advance(images, f"{written / 1e9:.2f} GB written")
                if record is None:
                    continue
                so_far.add(record)
                finished += record.last
                written += sum(shard.bytes for shard in record.shards)
                if None in lengths:  # estimated from the parts that are read
                    work.total = max(so_far.seen, so_far.seen * len(parts) // max(finished, 1))
                if so_far.seen >= REJECTS_AFTER:
                    whole = max(so_far.images, self.source.length or 0)
                    check_rejects(so_far, whole, self.config.max_reject_fraction)
            return work.done - before

    def _write_store(self, arrays: dict[str, ArraySpec], work: UnitRecord) -> TokenIndex:
        """Write the files beside the shards, the index last, once all units are there."""
        stored = sum(shard.samples for shard in work.shards)
        if stored + work.rejects != work.images:
            raise RuntimeError(f"{stored} stored and {work.rejects} rejected of {work.images}")
        beside = [asdict(entry) for entry in self.source.beside]
        rejects = self.out / REJECTS_FILE
        earlier = [] if self.old is None else self.old.rejects()
        entries = (*earlier, *beside, *work.lost)
        lines = [json.dumps(entry, sort_keys=True) + "\n" for entry in entries]
        lines = list(dict.fromkeys(lines)) if earlier else lines
        write_synced(rejects, "".join(lines).encode())
        check_rejects(work, work.images, self.config.max_reject_fraction, rejects)
        if self.old is not None:
            lost = sum(bool(json.loads(line)["image"]) for line in lines)
            return self._append(self.old, work, lost)
        if not work.shards:
            reasons = [f"{entry['source']}: {entry['reason']}" for entry in (*work.lost, *beside)]
            raise UserError(
                "; ".join([f"images={self.source.name}: no image could be used", *reasons[:2]])
            )
        for leftover in self.out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        for name, content in self.files().items():
            write_synced(self.out / name, content)
        self.ledger.write_recipe(self.out / RECIPE_FILE)
        shards = sorted(work.shards, key=lambda s: (split_rank(s.split), s.file))
        reduced = None if self.config.store == "full" else self.config.store
        thumbnails = self.config.thumbnails
        index = TokenIndex(arrays, shards, reduced, self.split_rule, work.rejects, thumbnails)
        index.write(self.out)
        self.ledger.clear()
        return index

    def _append(self, old: OldStore, work: UnitRecord, rejects: int) -> TokenIndex:
        """Put the index with the new shards in the place of the old one."""
        index = old.grown(work.shards, self.split_rule, rejects)
        this = {"images": self.source.name, "content of images": self.source.fingerprint}
        last = this | {"index": index.hash}
        appends = [*old.recipe.get("appends", []), last]
        content = old.recipe | {"appends": list({a["index"]: a for a in appends}.values())}
        recipe = json.dumps(content, sort_keys=True, indent=1).encode()
        write_synced(self.out / RECIPE_FILE, recipe)
        index.write(self.out)
        self.ledger.clear()
        return index

    def files(self) -> dict[str, bytes]:
        """Return the small files beside the shards, by name."""
        files = {HEADS_FILE: sorted_safetensors(*self.towers.heads())}
        scales = self.ledger.state / SCALES_FILE
        if scales.exists():
            files[SCALES_FILE] = scales.read_bytes()
        classes = embed_classes(self.towers.target, self.classes) if self.classes else None
        if classes is not None:
            files[CLASSES_FILE] = sorted_safetensors(*classes.content())
        return files


def sorted_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise with a sorted header; the library writes metadata in random order."""
    content = save(tensors, metadata)
    size = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + size]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def worker_of(shard: str | None) -> tuple[int, int]:
    """Return this process's number and the number of workers.

    `shard` is `extract.shard=i/n`; None takes the variables of torchrun, then of a Slurm array,
    then of srun.
    """
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", shard)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"extract.shard={shard} must be i/n with i from 0 to n - 1")
        return int(match[1]), int(match[2])
    variables = {name: text for name, text in os.environ.items() if text.strip()}
    worker, workers, names = 0, 1, "RANK WORLD_SIZE"
    if "RANK" in variables and "WORLD_SIZE" in variables:
        worker, workers = number(variables, "RANK"), number(variables, "WORLD_SIZE")
    elif "SLURM_ARRAY_TASK_ID" in variables:
        names = "SLURM_ARRAY_TASK_ID SLURM_ARRAY_TASK_COUNT"
        step = number(variables, "SLURM_ARRAY_TASK_STEP") or 1
        past = number(variables, "SLURM_ARRAY_TASK_ID") - number(variables, "SLURM_ARRAY_TASK_MIN")
        worker, workers = past // step, number(variables, "SLURM_ARRAY_TASK_COUNT") or 1
    elif is_task(variables):
        names = "SLURM_PROCID SLURM_NTASKS"
        worker, workers = number(variables, "SLURM_PROCID"), number(variables, tasks_of(variables))
    if not 0 <= worker < workers:
        raise UserError(
            f"{names} in the environment make this worker {worker} of {workers}: `unset {names}`, "
            "or give extract.shard=i/n"
        )
    return worker, workers


def device_of(device: str) -> str:
    """Return the torch device: `auto` takes this process's GPU, or the CPU where there is none."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        # torchrun numbers this machine's processes, or srun; of several GPUs srun may show one.
        task = "LOCAL_RANK" not in os.environ and is_task(os.environ)
        local = number(os.environ, "SLURM_LOCALID" if task else "LOCAL_RANK")
        device = f"cuda:{local % max(1, torch.cuda.device_count())}"
    if device != "cpu" and not re.fullmatch(r"cuda:\d+", device):
        raise UserError(f"extract.device={device} is not auto, cpu, cuda or cuda:N")
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"extract.device={device}: no GPU is visible; extract.device=cpu runs")
    return device


def extract(
    source: Source,
    towers: Mapping[str, Tower],
    out: Path,
    config: ExtractConfig,
    words: TextTower | None = None,
) -> Outcome:
    """Turn the images of a source into a token store; see `Extraction`."""
    return Extraction(source, towers, out, config, words).run()
