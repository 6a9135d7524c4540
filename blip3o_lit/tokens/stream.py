"""Token stores behind a URL: shards streamed in order through webdataset.

There is no random access, so the order is that of shuffled shards and a shuffle buffer, and a
resumed run continues approximately: at the first shard that was not finished. Validation shards are
downloaded once. Nothing is decoded by webdataset, whose default decoders unpickle: members are
checked against the index and read as plain numbers.

Shape suffixes: B samples.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import aiohttp
import fsspec
import numpy as np
import torch
from torch import Tensor
from webdataset.filters import shuffle
from webdataset.pipeline import DataPipeline
from webdataset.tariterators import group_by_keys

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.files import write_synced
from blip3o_lit.config.home import home
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.remote import open_remote, read_whole
from blip3o_lit.config.shape import PairShape
from blip3o_lit.tokens import tar
from blip3o_lit.tokens.heads import Head
from blip3o_lit.tokens.index import ShardEntry, TokenIndex
from blip3o_lit.tokens.loader import Batch, prefetch
from blip3o_lit.tokens.mode import pair_of_views
from blip3o_lit.tokens.order import random_permutation
from blip3o_lit.tokens.packed import PackedBatch, PackedTokens, restored
from blip3o_lit.tokens.reader import TokenStore, view_hash
from blip3o_lit.tokens.storage import SCALES_FILE, TORCH_TYPES, finite, load_scales, scale_array
from blip3o_lit.tokens.world import BatchPlan

SCHEMES = ("http", "https", "s3", "gs", "hf", "file")
SHUFFLE_BYTES = 1 << 29
"""Memory of a rank's shuffle buffer: 200 samples of the mission's pair."""
STATISTICS_SHARDS = 8
COPY_BYTES = 1 << 24
ATTEMPTS = 4
"""Failures in a row after which a shard is given up."""
PAUSE = 0.25
"""Seconds; waits are 1, 4 and 16 seconds."""


def is_url(store: Path | str) -> bool:
    """Return whether a store is given as a URL; `pipe:` counts, to be refused."""
    return "://" in str(store) or str(store).startswith("pipe:")


def open_url(url: str) -> BinaryIO:
    """Open a file behind a URL.

    Raises:
        UserError: On a scheme that is not listed, a missing file, or a missing driver.
    """
    scheme = url.partition(":")[0]
    if scheme not in SCHEMES or "://" not in url or "::" in url:
        raise UserError(f"{url}: {scheme}: is not read; use one of {', '.join(SCHEMES)}")
    try:
        return open_remote(url)
    except ImportError as error:
        raise UserError(f"{url}: {error}") from error
    except OSError as error:
        raise UserError(f"{url} can't be opened ({error}): check the address") from error


class RemoteStore:
    """The index, heads and validation shards of a store behind a URL."""

    def __init__(self, url: str, verify: str = "size") -> None:
        """Read index.json.

        Raises:
            UserError: If there is none, or it is not one that this version reads.
        """
        self.url, self.verify = url.rstrip("/"), verify
        with open_url(f"{self.url}/index.json") as file:
            self.index = TokenIndex.parse(file.read(), f"{self.url}/index.json")
        self.cache = home() / "remote" / self.index.hash[:32]

    def fetch(self, name: str) -> Path:
        """Download a file of the store into the cache, unless it is there, and return its path."""
        self.cache.mkdir(parents=True, exist_ok=True)
        path = self.cache / name
        if not path.is_file():
            with open_url(f"{self.url}/{name}") as source:
                write_synced(path, iter(lambda: source.read(COPY_BYTES), b""))
        return path

    def head(self, array: str) -> Head:
        """Return the norm and projection of an array's tower."""
        path = self.fetch("heads.safetensors")
        return Head.load(path, array, self.index.arrays[array].normed)

    def offers(self, name: str) -> bool:
        """Return whether the store has a file of that name."""
        system, path = fsspec.url_to_fs(f"{self.url}/{name}")
        return bool(system.exists(path))

    def local_split(self, split: str, limit: int | None) -> TokenStore:
        """Download the shards that hold the first `limit` samples of a split."""
        if any(spec.dtype == "int8" for spec in self.index.arrays.values()):
            self.fetch(SCALES_FILE)
        shards: list[ShardEntry] = []
        count = 0
        for entry in self.index.shards:
            if entry.split == split and (limit is None or count < limit):
                shards.append(entry)
                count += entry.samples
                self.fetch(entry.file)
        return TokenStore(self.cache, replace(self.index, shards=shards), self.verify)


def shard_members(stream: BinaryIO, url: str, index: TokenIndex) -> Iterator[dict[str, Any]]:
    """Yield a tar's files as webdataset's `group_by_keys` takes them, each checked before reading.

    Raises:
        UserError: On anything that the index does not promise.
    """
    sizes = {f"{name}.npy": s.nbytes + tar.NPY_HEADER_LIMIT for name, s in index.arrays.items()}
    sizes["json"] = tar.JSON_LIMIT
    while True:
        block = read_whole(stream, tar.BLOCK)
        parsed = tar.parse_header(block, url) if block else None
        if parsed is None:
            if not block:
                raise UserError(f"{url}: the shard is cut off")
            break
        name, size = parsed
        limit = sizes.get(name.partition(".")[2], -1)
        if size > limit:
            reason = "is not in index.json" if limit < 0 else f"claims {size} bytes"
            raise UserError(f"{url}: member {name} {reason}: the store is damaged or hostile")
        padded = size + -size % tar.BLOCK
        content = read_whole(stream, padded)
        if len(content) != padded:
            raise UserError(f"{url}: sample {name.partition('.')[0]} is cut off")
        yield {"fname": name, "data": content[:size], "__url__": url}
    yield {}


def shard_samples(
    url: str, entry: ShardEntry, index: TokenIndex, arrays: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Yield the samples of a shard: `__key__` and the stored numbers of `arrays`.

    Raises:
        UserError: If the shard is not what the index promises.
        OSError, aiohttp.ClientError: If the network fails.
    """
    count = 0
    try:
        with open_url(url) as stream:
            members = shard_members(stream, url, index)
            for sample in group_by_keys(members, lcase=False):
                out: dict[str, Any] = {"__key__": sample["__key__"]}
                for name in arrays:
                    where = f"{url}: {sample['__key__']}.{name}.npy"
                    spec, content = index.arrays[name], sample.get(f"{name}.npy", b"")
                    start = tar.npy_start(content, spec.stored, spec.shape, where)
                    if len(content) != start + spec.nbytes:
                        raise UserError(f"{where} has a wrong size: the store is damaged")
                    flat = np.frombuffer(content, spec.stored, offset=start)
                    if not finite(flat, spec.dtype):
                        raise UserError(f"{where} holds NaN or infinity: extract it again")
                    out[name] = flat.reshape(spec.shape)
                yield out
                count += 1
    except UserError:
        raise
    except (ValueError, AssertionError) as error:
        raise UserError(f"{url} is damaged ({error}): extract it again") from error
    if count != entry.samples:
        raise UserError(f"{url} holds {count} samples, index.json promises {entry.samples}")


class StreamReader:
    """The training split of a remote store, seen through one mode."""

    def __init__(self, store: RemoteStore, split: str, data: DataConfig, mode: ModeConfig) -> None:
        """Choose the shards; nothing but index.json (and heads, where needed) is fetched.

        Raises:
            UserError: If the store can't give the split, the arrays or the mode.
        """
        self.store, self.index = store, store.index
        self.arrays = (data.condition, data.target)
        self._views = pair_of_views(self.index, split, *self.arrays, mode, store.head)
        specs = {name: self.index.arrays[name] for name in self.arrays}
        token_scales = [scale_array(name) for name, spec in specs.items() if spec.scale == "token"]
        self._read = (*self.arrays, *token_scales)
        if any(spec.dtype == "int8" for spec in specs.values()):
            store.fetch(SCALES_FILE)
        self._scales = load_scales(store.cache, specs)
        self.shards = [s for s in self.index.shards if s.split == split][: data.max_shards]
        if data.subset:
            raise UserError("data.subset needs a local store: use data.max_shards with a URL")
        self.shard_sizes = np.array([shard.samples for shard in self.shards])
        limits = (data.max_shards, None)
        self.content_hash = view_hash(self.index, split, self.arrays, mode, limits)
        self.shape = PairShape(self._views["condition"].shape, self._views["target"].shape)

    def __len__(self) -> int:
        """Samples of the chosen shards."""
        return int(self.shard_sizes.sum())

    @property
    def sample_bytes(self) -> int:
        """Stored bytes of one pair."""
        return sum(self.index.arrays[name].nbytes for name in self.arrays)

    def samples(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a shard's samples with their ids, the same as a local reader's.

        When the network fails, the shard is opened again and goes on where it stopped.

        Raises:
            UserError: If the shard is damaged, or the network fails several times in a row.
        """
        entry = self.shards[number]
        first = int(self.shard_sizes[:number].sum())
        url = f"{self.store.url}/{entry.file}"
        given, failures = 0, 0
        while given < entry.samples:
            try:
                samples = shard_samples(url, entry, self.index, self._read)
                for place, sample in enumerate(samples):
                    if place >= given:
                        given, failures = place + 1, 0
                        yield sample | {"id": first + place}
            except (OSError, aiohttp.ClientError) as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise UserError(f"{url} can't be read ({error}): check the network") from error
                time.sleep(PAUSE * 4**failures)

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Stack samples and apply the mode; int8 tokens are restored to fp16."""
        return restored(self.collate_packed(samples))

    def collate_packed(self, samples: list[dict[str, Any]]) -> PackedBatch:
        """Stack samples and apply the mode; int8 tokens are restored later, on the device."""
        out: PackedBatch = {}
        for side, name in zip(("condition", "target"), self.arrays):
            view, spec = self._views[side], self.index.arrays[name]
            stacked = np.stack([sample[name][view.first :] for sample in samples])
            tokens: Tensor | PackedTokens
            tokens = torch.from_numpy(stacked).view(TORCH_TYPES[spec.dtype])
            if spec.dtype == "int8":
                token_BN = None
                if spec.scale == "token":
                    rows = [sample[scale_array(name)][view.first :] for sample in samples]
                    token_BN = torch.from_numpy(np.stack(rows))
                scale_KC = torch.from_numpy(self._scales[name][view.first : int(spec.cls) + 1])
                tokens = PackedTokens(tokens, scale_KC, token_BN)
            if view.computes:
                plain = tokens.restore() if isinstance(tokens, PackedTokens) else tokens
                tokens = view.compute(plain)
            out[side] = tokens
        out["sample"] = torch.tensor([sample["id"] for sample in samples])
        return out

    def statistics_batches(self, images: int) -> Iterator[Batch]:
        """Yield batches from a few shards spread over the split, `images` at most."""
        count = min(len(self.shards), STATISTICS_SHARDS)
        numbers = np.linspace(0, len(self.shards) - 1, count).round().astype(int)
        every = (sample for n in numbers for sample in self.samples(int(n)))
        kept = itertools.islice(every, images)
        while batch := list(itertools.islice(kept, 16)):
            yield self.collate(batch)


class StreamLoader:
    """Training micro-batches of one rank from a remote store; resume is approximate.

    A rank reads its own shards of every epoch's shuffled list, epoch after epoch, so all ranks have
    the same number of batches whatever the shards hold.
    """

    approximate_resume = True

    def __init__(
        self,
        reader: StreamReader,
        seed: int,
        plan: BatchPlan,
        steps: int,
        rank: int = 0,
    ) -> None:
        """Prepare `steps` optimizer steps.

        Raises:
            UserError: If there are fewer shards than processes.
        """
        if len(reader.shards) < plan.world_size:
            raise UserError(
                f"{reader.store.url} has {len(reader.shards)} training shards for "
                f"{plan.world_size} processes: lower trainer.devices or extract smaller shards"
            )
        self.reader, self.seed, self.plan, self.steps = reader, seed % 2**63, plan, steps
        self.rank = rank
        self._start_step, self._start_samples, self._taken = 0, 0, 0

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before a resume included."""
        return self.steps * self.plan.accumulation

    def _shards(self, epoch: int) -> list[int]:
        """Return this rank's shards of an epoch in order, without those it has finished."""
        order = random_permutation(self.seed, epoch, 0, len(self.reader.shards))
        mine = order[self.rank :: self.plan.world_size]
        start, place = divmod(self._start_samples, len(self.reader))
        if epoch > start:
            return mine.tolist()
        ends = np.cumsum(self.reader.shard_sizes[mine])
        return mine[ends > place // self.plan.world_size].tolist()

    def _samples(self) -> Iterator[dict[str, Any]]:
        """Yield this rank's samples for ever; each epoch is shuffled by itself."""
        buffer = max(1, min(len(self.reader), SHUFFLE_BYTES // self.reader.sample_bytes))
        for epoch in itertools.count(self._start_samples // len(self.reader)):
            rng = random.Random(f"{self.seed}/{epoch}/{self.rank}")
            numbers = self._shards(epoch)
            source = partial(self._read, numbers, epoch)
            yield from DataPipeline(source, shuffle(buffer, buffer // 4, rng=rng))

    def _read(self, numbers: list[int], epoch: int) -> Iterator[dict[str, Any]]:
        for number in numbers:
            for sample in self.reader.samples(number):
                yield sample | {"epoch": epoch}

    def __iter__(self) -> Iterator[PackedBatch]:
        """Yield this rank's micro-batches from the starting point on."""
        self._taken = 0
        samples = self._samples()

        def job() -> PackedBatch:
            chosen = list(itertools.islice(samples, self.plan.micro_batch_size))
            batch = self.reader.collate_packed(chosen)
            batch["epoch"] = torch.tensor([sample["epoch"] for sample in chosen])
            return batch

        count = (self.steps - self._start_step) * self.plan.accumulation
        jobs: Iterator[Callable[[], PackedBatch]] = itertools.repeat(job, count)
        for batch in prefetch(jobs, threads=1):
            self._taken += 1
            yield batch
            del batch  # As in TokenLoader.

    def state_dict(self) -> dict[str, Any]:
        """Return the position in global samples; which of them is known to a shard only."""
        steps = self._taken // self.plan.accumulation
        return {
            "samples": self._start_samples + steps * self.plan.batch_size,
            "steps": self._start_step + steps,
            "batch_size": self.plan.batch_size,
            "approximate": True,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the first shard that was not finished."""
        self._start_step, self._start_samples = state["steps"], state["samples"]
        self._taken = 0
