"""Loaders over a reader: prefetch in threads, exact lengths, exact resume.

Lightning 2.6 never exhausts a sized iterator, may call `iter` more than once before it takes the
first batch, and saves `state_dict()` of rank 0 alone in the middle of an epoch. So: the whole run
is one pass, reading starts with the first `next`, and the state is in global samples that the
training loop has taken, never what threads have read ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.flow.draws import Stream, uniforms
from blip3o_lit.tokens.reading.ahead import fetched_ahead
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.mixed_order import MixedOrder
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.packed import PackedBatch, uploaded
from blip3o_lit.tokens.reading.reader import TokenReader

T = TypeVar("T")
R = TypeVar("R")


def ordered(
    pool: ThreadPoolExecutor, function: Callable[[T], R], items: Iterable[T], window: int
) -> Iterator[R]:
    """Map in a pool and yield the results in order; at most `window` of them wait."""
    source = iter(items)
    waiting = deque(pool.submit(function, item) for item in islice(source, window))
    while waiting:
        result = waiting.popleft().result()
        # Last of all: the thread that this wakes competes for the interpreter.
        waiting.extend(pool.submit(function, item) for item in islice(source, 1))
        yield result


def prefetch(function: Callable[[T], R], items: Iterable[T], threads: int) -> Iterator[R]:
    """Map ahead in threads: copying tokens releases the interpreter lock."""
    pool = ThreadPoolExecutor(threads, "tokens")
    try:
        yield from ordered(pool, function, items, threads + 1)
    finally:
        pool.shutdown(cancel_futures=True)


class TokenLoader:
    """Training micro-batches of one rank for a whole run; `stream` copies them to its device.

    Where there are words, an image's caption is drawn by seed, epoch and sample.
    """

    def __init__(
        self,
        reader: TokenReader,
        order: SampleOrder | MixedOrder,
        plan: BatchPlan,
        steps: int,
        rank: int = 0,
        threads: int = 2,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.plan, self.steps, self.rank = plan, steps, rank
        self._start_step, self._start_samples, self._taken = 0, 0, 0
        self.reader, self.order, self.threads, self.stream = reader, order, threads, stream

    def __len__(self) -> int:
        """Micro-batches of the whole run, those before a resume included (Lightning counts on)."""
        return self.steps * self.plan.accumulation

    @property
    def micro_batches(self) -> int:
        """Micro-batches from the starting point on."""
        return (self.steps - self._start_step) * self.plan.accumulation

    def counted(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        """Yield the batches, counting those that the training loop takes."""
        self._taken = 0
        for batch in batches:
            self._taken += 1
            yield batch
            del batch  # Freeing lets go of the interpreter: do it before a thread is woken.

    def _position(self, number: int) -> int:
        step, micro = divmod(number, self.plan.accumulation)
        first = self._start_samples + step * self.plan.batch_size
        return first + self.plan.offset(self.rank, micro)

    def _read(self, position: int) -> PackedBatch:
        ids, epochs = self.order.at(position, self.plan.micro_batch_size)
        sample_B, epoch_B = torch.from_numpy(ids), torch.from_numpy(epochs)
        captions = {}
        if self.reader.words:
            draw_B1 = uniforms(self.order.seed, Stream.CAPTION, sample_B, epoch_B)
            captions["draw_B"] = draw_B1[:, 0].double().numpy()
        batch = self.reader.read_packed(ids, self.stream is not None, **captions)
        batch["sample"], batch["epoch"] = sample_B, epoch_B
        return uploaded(batch, self.stream)

    def __iter__(self) -> Iterator[PackedBatch]:
        order = self.order.again()  # which keeps windows of its own
        numbers, size = range(self.micro_batches), self.plan.micro_batch_size
        ids = (order.at(self._position(number), size)[0] for number in numbers)
        positions = (self._position(number) for number in numbers)
        items = fetched_ahead(self.reader, positions, ids)
        yield from self.counted(prefetch(self._read, items, self.threads))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in global samples after the last whole step, equal on every rank.

        Micro-batches of an unfinished step don't count: their gradients are not in a checkpoint.
        Beside it, what must be the same when the run goes on.
        """
        steps = self._taken // self.plan.accumulation
        return {
            "samples": self._start_samples + steps * self.plan.batch_size,
            "steps": self._start_step + steps,
            "batch_size": self.plan.batch_size,
            "seed": self.order.seed,
            "data": self.reader.content_hash,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the samples of `state`; world size and batch size may differ."""
        if state.get("seed", self.order.seed) != self.order.seed:
            raise UserError(
                f"the checkpoint's data order has seed={state['seed']}, this run "
                f"seed={self.order.seed}: resume with the same seed"
            )
        if state.get("data") != self.reader.content_hash:
            raise UserError(
                "the checkpoint was trained on other data (store, mode, condition, target or "
                "subset): resume with the same data and mode, or start a new run"
            )
        self._start_step, self._start_samples = state["steps"], state["samples"]
        self._taken = 0


class ValidationLoader:
    """A whole split once, in store order: equal batches on every rank, the tail padded.

    Words are those of an image's first caption. Batches carry `valid` `[B]`: False marks padding,
    repeats of the last sample.
    """

    def __init__(
        self,
        reader: TokenReader,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 2,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.reader, self.rank, self.world_size = reader, rank, world_size
        self.batch_size = min(batch_size, -(-len(reader) // world_size))
        self.threads, self.stream = threads, stream

    def __len__(self) -> int:
        return -(-len(self.reader) // (self.batch_size * self.world_size))

    def _ids(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a batch's ids, and the same without the padding at the end."""
        first = (number * self.world_size + self.rank) * self.batch_size
        padded = np.arange(first, first + self.batch_size)
        return np.minimum(padded, len(self.reader) - 1), padded

    def _read(self, number: int) -> PackedBatch:
        ids, padded = self._ids(number)
        batch = self.reader.read_packed(ids, self.stream is not None)
        batch["sample"] = torch.from_numpy(ids)
        batch["valid"] = torch.from_numpy(padded == ids)
        batch["epoch"] = torch.zeros_like(batch["sample"])
        return uploaded(batch, self.stream)

    def __iter__(self) -> Iterator[PackedBatch]:
        numbers = range(len(self))
        items = fetched_ahead(self.reader, numbers, (self._ids(number)[0] for number in numbers))
        yield from prefetch(self._read, items, self.threads)
