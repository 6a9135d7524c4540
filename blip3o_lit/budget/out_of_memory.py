"""What helps when memory runs out: the next batch size, and the option that saves most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from blip3o_lit.base.units import gib
from blip3o_lit.budget.activations import activations
from blip3o_lit.budget.plan import Plan
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.models.precision import PRECISIONS

_CPU = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's way to say that memory ran out, on a GPU or a CPU."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _CPU)
    )


@contextmanager
def memory_limit(advice: Callable[[], str]) -> Iterator[None]:
    """Give advice, one line, when memory runs out inside.

    Raises:
        UserError: In place of the error about memory.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(advice()) from error


def batch_limit(key: str, size: int) -> AbstractContextManager[None]:
    """Name the next batch size when memory runs out inside; `key` is its override, `size` now."""
    line = f"out of memory with {key}={size}: try {key}={max(size // 2, 1)}"
    return memory_limit(lambda: line)


def training_limit(config: TrainConfig, plan: Plan) -> AbstractContextManager[None]:
    """Name the next micro-batch and the option that saves most when memory runs out inside."""
    return memory_limit(lambda: advice(config, plan))


def advice(config: TrainConfig, plan: Plan) -> str:
    """Return one line: what ran out, and what to try, the largest saving first."""
    micro = plan.placement.micro_batch
    line = f"out of memory on {plan.device} with micro_batch_size={micro}"
    if micro > 1:
        smaller = max(n for n in range(1, micro) if micro % n == 0)
        line += f": try micro_batch_size={smaller}, which takes the same steps"
    saved = {word: size for word, size in savings(config, plan).items() if size > 0}
    if saved:
        best = max(saved, key=lambda word: saved[word])
        line += (
            f"{'; ' if micro > 1 else ': '}{best} saves most, about {gib(saved[best])} a process"
        )
    elif micro == 1:
        line += ": try a smaller model="
    return line


def savings(config: TrainConfig, plan: Plan) -> dict[str, float]:
    """Return what each option that is off would save, in bytes per process."""
    place = plan.placement

    def of(changed: TrainConfig, word: str) -> int:
        needed = activations(changed.model, changed.flow, plan.shape, PRECISIONS[word])
        return needed.of(place.micro_batch)

    now = plan.activations.of(place.micro_batch)
    lean = replace(config, model=replace(config.model, activation_checkpointing=True))
    saved: dict[str, float] = {
        "model.activation_checkpointing=true": now - of(lean, place.precision.name)
    }
    if not place.precision.low:
        saved["precision=bf16"] = now - of(config, "bf16")
    if place.strategy == "ddp":
        saved["strategy=fsdp2"] = plan.state_bytes * (1 - 1 / place.world)
    return saved
