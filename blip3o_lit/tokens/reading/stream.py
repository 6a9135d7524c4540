"""Training on a token store behind a URL: shards streamed in order through a shuffle buffer.

There is no random access, so the order is that of shuffled shards and a shuffle buffer, and a
resumed run continues approximately: at the first shard that was not finished.

Shape suffixes: B samples, N tokens, K rows of scales, C channels.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from webdataset.filters import shuffle

from blip3o_lit.base.remote import resumed
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.loader import Batch, TrainingLoader, prefetch
from blip3o_lit.tokens.reading.order import random_permutation
from blip3o_lit.tokens.reading.packed import PackedBatch, PackedTokens, restored
from blip3o_lit.tokens.reading.reader import view_hash
from blip3o_lit.tokens.store.remote_store import RemoteStore
from blip3o_lit.tokens.store.storage import SCALES_FILE, TORCH_TYPES, load_scales, scale_array
from blip3o_lit.tokens.views import pair_of_views

SHUFFLE_BYTES = 1 << 29
"""Memory of a rank's shuffle buffer."""
STATISTICS_SHARDS = 8


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
        return int(self.shard_sizes.sum())

    @property
    def sample_bytes(self) -> int:
        """Stored bytes of one pair."""
        return sum(self.index.arrays[name].nbytes for name in self.arrays)

    def samples(self, number: int) -> Iterator[dict[str, Any]]:
        """Yield a shard's samples with their ids, the same as a local reader's.

        Raises:
            UserError: If the shard is damaged, or the network fails several times in a row.
        """
        entry = self.shards[number]
        first = int(self.shard_sizes[:number].sum())

        def read(start: int) -> Iterator[dict[str, np.ndarray]]:
            return itertools.islice(self.store.samples(entry, self._read), start, None)

        for place, sample in enumerate(resumed(read, f"{self.store.url}/{entry.file}")):
            yield sample | {"id": first + place}

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
        chosen = itertools.islice(every, images)
        while batch := list(itertools.islice(chosen, 16)):
            yield self.collate(batch)


class StreamLoader(TrainingLoader):
    """Training micro-batches of one rank from a remote store; resume is approximate.

    A rank reads its own shards of every epoch's shuffled list, epoch after epoch, so all ranks have
    the same number of batches whatever the shards hold.
    """

    approximate_resume = True

    def __init__(
        self, reader: StreamReader, seed: int, plan: BatchPlan, steps: int, rank: int = 0
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
        super().__init__(plan, steps, rank)
        self.reader, self.seed = reader, seed % 2**63

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

        def job() -> PackedBatch:
            chosen = list(itertools.islice(samples, self.plan.micro_batch_size))
            batch = self.reader.collate_packed(chosen)
            batch["epoch"] = torch.tensor([sample["epoch"] for sample in chosen])
            return batch

        jobs: Iterator[Callable[[], PackedBatch]] = itertools.repeat(job, self.micro_batches)
        yield from self.counted(prefetch(jobs, threads=1))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in global samples; which of them is known to a shard only."""
        return super().state_dict() | {"approximate": True}
