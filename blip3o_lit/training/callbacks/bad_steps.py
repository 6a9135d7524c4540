"""Steps whose gradients are not finite: skipped by the module, reported and limited here.

A skipped step changes neither weights nor moments; its images count as seen. Whether a step was
skipped is known on the device alone, and is read where a row is logged anyway, so that training
never waits for it.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from blip3o_lit.config.errors import UserError

log = logging.getLogger("blip3o_lit")
_NAMED = 8
"""Samples that are named of a step, at most."""


class StepRecord(NamedTuple):
    """One optimizer step."""

    step: int
    """Its number, from 1 on."""
    finite: Tensor
    """Whether the gradient norm was finite, a bool on the device."""
    samples: list[Tensor]
    """Ids of this process's samples, a tensor a micro-batch."""


class BadSteps(Callback):
    """Says which steps were skipped and on which samples; stops a run that skips too many."""

    def __init__(self, every: int, limit: int) -> None:
        """Set the rhythm.

        Args:
            every: Steps between two looks.
            limit: Skipped steps in a row that stop the run.
        """
        self.every, self.limit = every, limit
        self.skipped = 0
        self._in_a_row = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the steps since the last look.

        Raises:
            UserError: If `limit` steps in a row were skipped.
        """
        records: list[StepRecord] = pl_module.step_records  # type: ignore[assignment]
        due = trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps
        if not records or not due:
            return
        finite = torch.stack([record.finite for record in records]).tolist()
        for good, record in zip(finite, records):
            self._in_a_row = 0 if good else self._in_a_row + 1
            if good:
                continue
            self.skipped += 1
            ids = torch.cat(record.samples).tolist()
            named = ", ".join(map(str, ids[:_NAMED])) + (", ..." if len(ids) > _NAMED else "")
            text = f"step {record.step} was skipped: its gradient is not finite; samples {named}"
            log.warning(text)
            print(f"warning: {text} (process {trainer.global_rank})", flush=True)
            if self._in_a_row >= self.limit:
                raise UserError(
                    f"{self.limit} steps in a row up to step {record.step} had gradients that are "
                    f"not finite, the last on samples {named}: go on from an earlier checkpoint "
                    "with a lower optimizer.lr or precision=fp32, or raise trainer.max_bad_steps"
                )
        records.clear()
