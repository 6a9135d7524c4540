"""What helps when memory runs out: the next batch size, and the option that saves most."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch

from blip3o_lit.base.units import gib
from blip3o_lit.budget.activations import activations
from blip3o_lit.budget.plan import Plan
from blip3o_lit.config.errors import UserError
from blip3o_lit.models.precision import PRECISIONS

CPU_WORDS = ("can't allocate memory", "not enough memory")


@contextmanager
def memory_limit(advice: Callable[[], str]) -> Iterator[None]:
    """Raise a UserError, with advice in one line, when memory runs out inside."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(advice()) from error
    except RuntimeError as error:
        if any(words in str(error) for words in CPU_WORDS):
            raise UserError(advice()) from error
        raise


def batch_limit(key: str, size: int) -> AbstractContextManager[None]:
    """Name the next batch size when memory runs out inside; `key` is its override, `size` now."""
    line = f"out of memory with {key}={size}: try {key}={max(size // 2, 1)}"
    return memory_limit(lambda: line)


def advice(plan: Plan) -> str:
    """Return one line: what ran out, and what to try, the largest saving first."""
    micro = plan.placement.micro_batch
    line = f"out of memory on {plan.device_name} with micro_batch_size={micro}"
    if micro > 1:
        smaller = max(n for n in range(1, micro) if micro % n == 0)
        line += f": try micro_batch_size={smaller}, which takes the same steps"
    option, size = max(savings(plan).items(), key=lambda saving: saving[1])
    if size > 0:
        line += f"{'; ' if micro > 1 else ': '}{option} saves most, about {gib(size)} a process"
    elif micro == 1:
        line += ": try a smaller model="
    return line


def savings(plan: Plan) -> dict[str, float]:
    """Return what each option that is off would save, in bytes per process."""
    place, config = plan.placement, plan.config
    now = plan.activation_bytes()
    lean = replace(config.model, activation_checkpointing=True)
    recomputed = activations(lean, config.flow, plan.shape, place.precision, place.device)
    saved: dict[str, float] = {
        "model.activation_checkpointing=true": now
        - recomputed.of(place.micro_batch, place.strategy)
    }
    if not place.precision.low:
        bf16 = activations(config.model, config.flow, plan.shape, PRECISIONS["bf16"], place.device)
        saved["precision=bf16"] = now - bf16.of(place.micro_batch, place.strategy)
    if place.strategy == "ddp":
        saved["strategy=fsdp2"] = plan.state_bytes() * (1 - 1 / place.world)
    return saved
