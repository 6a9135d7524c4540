"""Steps whose gradients are not finite: skipped by the module, reported and limited here.

A skipped step changes neither weights nor moments; its images count as seen. Whether a step was
skipped is known on the device alone, and is read where a row is logged anyway, so that training
never waits for it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.models.initialisation import local

log = logging.getLogger("blip3o_lit")
NAMED_SAMPLES = 8


class BadSteps(Callback):
    """Looks every N steps; stops a run that skips `limit` steps in a row."""

    def __init__(self, every: int, limit: int) -> None:
        self.every, self.limit = every, limit
        self._in_a_row = 0
        self._norms: list[Tensor] = []
        self._samples: list[list[Tensor]] = [[]]
        """Ids of this process's samples: per step since the last look, per micro-batch."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._samples[-1].append(batch["sample"])
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of a step
        self._norms.append(pl_module.gradient_norm)  # type: ignore[arg-type]
        last = trainer.global_step
        if last % self.every == 0 or last == trainer.max_steps:
            finite = torch.isfinite(torch.stack(self._norms)).tolist()
            first = last - len(finite) + 1
            where = "" if finite[-1] else first_bad(pl_module, last)
            for step, good, samples in zip(range(first, last + 1), finite, self._samples):
                self._in_a_row = 0 if good else self._in_a_row + 1
                if not good:
                    self._report(step, torch.cat(samples).tolist(), trainer.global_rank, where)
            self._norms, self._samples = [], []
        self._samples.append([])

    def _report(self, step: int, samples: list[int], rank: int, where: str) -> None:
        names = ", ".join(map(str, samples[:NAMED_SAMPLES]))
        names += ", ..." if len(samples) > NAMED_SAMPLES else ""
        text = f"step {step} was skipped: its gradient is not finite; samples {names}{where}"
        log.warning(text)
        print(f"warning: {text} (process {rank})", flush=True)
        if self._in_a_row >= self.limit:
            raise UserError(
                f"{self.limit} steps in a row up to step {step} had gradients that are "
                f"not finite, the last on samples {names}{where}: go on from an earlier checkpoint "
                "with a lower optimizer.lr or precision=fp32, or raise trainer.max_bad_steps"
            )


def first_bad(module: LightningModule, step: int) -> str:
    """Name the first parameter whose gradient, or this rank's share of it, is not finite."""
    for name, parameter in module.named_parameters():
        if parameter.grad is not None and not torch.isfinite(local(parameter.grad)).all():
            return f" (in step {step} first in {name})"
    return ""
