"""What helps when memory runs out: the next batch size, and the option that saves most."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.plan import Plan, activation_bytes

_CPU = ("can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is torch's way to say that memory ran out, on a GPU or a CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _CPU)
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
    said = f"out of memory with {key}={size}: try {key}={max(size // 2, 1)}"
    return memory_limit(lambda: said)


def training_limit(config: TrainConfig, plan: Plan) -> AbstractContextManager[None]:
    """Name the next micro-batch and the option that saves most when memory runs out inside."""
    return memory_limit(lambda: relief(config, plan))


def relief(config: TrainConfig, plan: Plan) -> str:
    """Return one line: what ran out, and what to try, the largest saving first."""
    said = f"out of memory on {plan.device} with micro_batch_size={plan.micro_batch}"
    if plan.micro_batch > 1:
        smaller = max(n for n in range(1, plan.micro_batch) if plan.micro_batch % n == 0)
        said += f": try micro_batch_size={smaller}, which takes the same steps"
    saved = {word: size for word, size in savings(config, plan).items() if size > 0}
    if saved:
        best = max(saved, key=lambda word: saved[word])
        said += f"{'; ' if plan.micro_batch > 1 else ': '}{best} saves most, about "
        said += f"{saved[best]:.1f} GiB a process"
    elif plan.micro_batch == 1:
        said += ": try a smaller model="
    return said


def savings(config: TrainConfig, plan: Plan) -> dict[str, float]:
    """Return what each option that is off would save, in GiB a process."""
    tokens, low = plan.shape.target.tokens, 4 if config.precision.name in ("fp32", "tf32") else 2

    def activations(changed: TrainConfig, width_bytes: int = low) -> float:
        return plan.micro_batch * activation_bytes(changed.model, tokens, width_bytes) / 2**30

    now = activations(config)
    lean = replace(config, model=replace(config.model, activation_checkpointing=True))
    found = {"model.activation_checkpointing=true": now - activations(lean)}
    if low == 4:
        found["precision=bf16"] = now - activations(config, 2)
    if plan.world > 1 and config.strategy.name != "fsdp2":
        found["strategy=fsdp2"] = plan.state_gib * (1 - 1 / plan.world)
    return found
