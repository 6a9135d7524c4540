"""Training on a token store behind a URL: shards streamed in order through a shuffle buffer.

There is no random access, so the order is that of shuffled shards and a shuffle buffer, and a
resumed run continues approximately: at the first shard that was not finished.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from webdataset.filters import shuffle

from blip3o_lit.base.remote import resumed
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.loader import TrainingLoader, prefetch
from blip3o_lit.tokens.reading.order import random_permutation
from blip3o_lit.tokens.reading.packed import Batch, PackedBatch, PackedTokens, restored, uploaded
from blip3o_lit.tokens.reading.reader import PairReader
from blip3o_lit.tokens.store.int8 import SCALES_FILE, load_scales, scale_array
from blip3o_lit.tokens.store.remote_store import RemoteStore
from blip3o_lit.tokens.store.storage import TORCH_TYPES

SHUFFLE_BYTES = 1 << 29
"""Memory of a rank's shuffle buffer."""
STATISTICS_SHARDS = 8
STATISTICS_BATCH = 16


class StreamReader(PairReader):
    """The training split of a remote store, seen through one mode."""

    def __init__(self, store: RemoteStore, split: str, data: DataConfig, mode: ModeConfig) -> None:
        sides, limits = (data.condition, data.target), (data.max_shards, None)
        super().__init__(store.index, split, sides, mode, limits, store.head)
        if data.subset:
            raise UserError("data.subset needs a local store: use data.max_shards with a URL")
        self.store = store
        specs = {name: self.index.arrays[name] for name in sides}
        token_scales = [scale_array(name) for name, spec in specs.items() if spec.scale == "token"]
        self._read = (*sides, *token_scales)
        if any(spec.dtype == "int8" for spec in specs.values()):
            store.fetch(SCALES_FILE)
        self._scales = load_scales(store.cache, specs)
        self.shards = [s for s in self.index.shards if s.split == split][: data.max_shards]
        self.shard_sizes = np.array([shard.samples for shard in self.shards])

    def samples(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a shard's samples with their ids, the same as a local reader's."""
        entry = self.shards[number]
        first = int(self.shard_sizes[:number].sum())

        def read(start: int) -> Iterator[dict[str, np.ndarray]]:
            return itertools.islice(self.store.samples(entry, self._read), start, None)

        for place, sample in enumerate(resumed(read, f"{self.store.url}/{entry.file}")):
            yield sample | {"id": first + place}

    def collate(self, samples: list[dict[str, Any]]) -> Batch:
        return restored(self.collate_packed(samples))

    def collate_packed(self, samples: list[dict[str, Any]]) -> PackedBatch:
        """Stack samples and apply the mode; int8 tokens are restored later, on the device."""

        def stacked(name: str, first: int) -> Tensor:
            rows = np.stack([sample[name][first:] for sample in samples])
            return torch.from_numpy(rows).view(TORCH_TYPES[self.index.arrays[name].dtype])

        out: PackedBatch = {}
        for (side, view), name in zip(self.views.items(), self.array_names):
            spec = self.index.arrays[name]
            first, by_token = view.first, spec.scale == "token"
            tokens: Tensor | PackedTokens = stacked(name, first)
            if spec.dtype == "int8":
                token_BN = stacked(scale_array(name), first) if by_token else None
                scale_KC = torch.from_numpy(self._scales[name][first : int(spec.cls) + 1])
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
        samples = (sample for number in numbers for sample in self.samples(int(number)))
        chosen = itertools.islice(samples, images)
        while batch := list(itertools.islice(chosen, STATISTICS_BATCH)):
            yield self.collate(batch)


class StreamLoader(TrainingLoader):
    """Training micro-batches of one rank from a remote store; resume is approximate.

    A rank reads its own shards of every epoch's shuffled list, epoch after epoch, so all ranks have
    the same number of batches whatever the shards hold.
    """

    def __init__(
        self,
        reader: StreamReader,
        seed: int,
        plan: BatchPlan,
        steps: int,
        rank: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        if len(reader.shards) < plan.world_size:
            raise UserError(
                f"{reader.store.url} has {len(reader.shards)} training shards for "
                f"{plan.world_size} processes: lower trainer.devices or extract smaller shards"
            )
        super().__init__(plan, steps, rank)
        self.reader, self.seed, self.stream = reader, seed % 2**63, stream

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
            source = self._read(self._shards(epoch), epoch)
            yield from shuffle(buffer, buffer // 4, rng=rng)(source)

    def _read(self, numbers: list[int], epoch: int) -> Iterator[dict[str, Any]]:
        for number in numbers:
            for sample in self.reader.samples(number):
                yield sample | {"epoch": epoch}

    def __iter__(self) -> Iterator[PackedBatch]:
        samples = self._samples()

        def batch(_: int) -> PackedBatch:
            chosen = list(itertools.islice(samples, self.plan.micro_batch_size))
            out = self.reader.collate_packed(chosen)
            out["epoch"] = torch.tensor([sample["epoch"] for sample in chosen])
            return uploaded(out, self.stream)

        yield from self.counted(prefetch(batch, range(self.micro_batches), threads=1))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in global samples; which of them is known to a shard only."""
        return super().state_dict() | {"approximate": True}
