"""How a global batch is cut over processes and micro-batches, and how a checkpoint follows.

A global batch is one optimizer step. Rank r of W takes the r-th contiguous block of it and reads it
in `accumulation` contiguous micro-batches, so that the samples of a step are the same for every W
and every micro-batch size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blip3o_lit.config.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The cut of one global batch of `batch_size` samples."""

    batch_size: int
    world_size: int
    micro_batch_size: int
    """Samples of one forward pass of one process."""

    @property
    def accumulation(self) -> int:
        """Forward passes of a process per optimizer step."""
        return self.batch_size // (self.world_size * self.micro_batch_size)

    def offset(self, rank: int, micro: int) -> int:
        """Return where a rank's micro-batch starts inside the global batch."""
        return rank * (self.batch_size // self.world_size) + micro * self.micro_batch_size


def batch_plan(batch_size: int, micro_batch_size: int | None, world_size: int) -> BatchPlan:
    """Cut a global batch; without `micro_batch_size` a process takes its share in one pass."""
    if batch_size < 1 or batch_size % world_size:
        raise UserError(
            f"batch_size={batch_size} does not divide over {world_size} processes: "
            f"use a multiple of {world_size} or change trainer.devices"
        )
    share = batch_size // world_size
    micro = share if micro_batch_size is None else micro_batch_size
    if micro < 1 or share % micro:
        most = min(max(micro, 1), share)
        divisor = max(size for size in range(1, most + 1) if share % size == 0)
        raise UserError(
            f"micro_batch_size={micro} does not divide a process's share of {share} "
            f"(batch_size={batch_size}, {world_size} processes): use {divisor}"
        )
    return BatchPlan(batch_size, world_size, micro)


def align_checkpoint(checkpoint: dict[str, Any], accumulation: int) -> None:
    """Make a checkpoint's loop counters and data position agree with its optimizer steps, in place.

    Call it from `LightningModule.on_load_checkpoint`. Lightning counts micro-batches; after a
    change of world or micro-batch size, a save in mid-accumulation or in mid-step, or a longer
    `max_steps`, its counters would make the resumed run step at wrong places or stop at once.
    """
    steps = checkpoint["global_step"]
    fit = checkpoint["loops"]["fit_loop"]
    progress = fit["epoch_loop.batch_progress"]
    batches = steps * accumulation
    for counter in (progress["current"], progress["total"]):
        counter.update(ready=batches, started=batches, processed=batches, completed=batches)
    progress["is_last_batch"] = False
    for counter in (fit["epoch_progress"]["current"], fit["epoch_progress"]["total"]):
        counter.update(ready=1, started=1, processed=0, completed=0)
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = steps
    for state in fit["state_dict"].get("combined_loader", []):
        if "samples" in state:
            state["samples"] -= (state["steps"] - steps) * state["batch_size"]
            state["steps"] = steps
