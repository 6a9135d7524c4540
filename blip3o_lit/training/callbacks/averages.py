"""Stores the averages that a run keeps for a later choice, some times over the run.

Of sharded averages the first rank gathers each parameter, in the stored format.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from blip3o_lit.checkpoints.background import Background
from blip3o_lit.checkpoints.snapshots import STORED, begin_snapshots, write_snapshot
from blip3o_lit.models.initialisation import is_sharded


class Snapshots(Callback):
    """Writes a file every N steps; `saves` does it, while training goes on or not."""

    def __init__(
        self, folder: Path, every: int, widths: list[float], saves: Background, resumed: Path | None
    ) -> None:
        self.folder, self.every, self.widths = folder, every, widths
        self.saves, self.resumed = saves, resumed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            begin_snapshots(self.folder.parent, trainer.global_step, self.resumed)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if (batch_idx + 1) % trainer.accumulate_grad_batches or step % self.every:
            return
        first = trainer.is_global_zero
        averages = [stored(average, first) for average in pl_module.profiles]
        if first:
            write = partial(write_snapshot, averages, self.widths, step, self.folder)
            self.saves.do(write)


def stored(average: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return the parameters on the CPU, whole; a process without `keep` only gives its shares."""
    tensors = {}
    for name, parameter in average.named_parameters():
        tensor = parameter.detach()
        if not (keep or is_sharded(tensor)):
            continue
        half = tensor.to(STORED)
        whole = half.full_tensor() if is_sharded(half) else half  # type: ignore[attr-defined]
        if keep:
            tensors[name] = whole.cpu().contiguous()
    return tensors
