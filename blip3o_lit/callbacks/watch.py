"""Says what a run waits for when it stands still: data that don't come, or a rank that hangs.

A thread of each process looks at what the training loop does. Ranks tell each other through the
store that their process group was made with, so the rank that is behind is known by name, where the
backend's own error only knows a socket.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from blip3o_lit.base.units import human_time
from blip3o_lit.config.errors import UserError

log = logging.getLogger("blip3o_lit")

DATA_SECONDS = 30.0
"""A batch that takes longer is told of; again at twice the time."""
RANK_SECONDS = 540.0
"""A rank that is that long in one step while another is behind ends the run: before NCCL would."""
POLL = 0.5
SILENT = 1.5
"""Seconds without a sign of life after which a process counts as dead or stopped."""
HUNG_CODE = 1

KEY = "blip3o_watch/"
DATA, STEP, VALIDATION = "the wait for data", "the gradients' all-reduce", "validation's all-gather"


class Watch(Callback):
    """Watches one process; the last of the callbacks, so that theirs don't count as reading.

    Args:
        store: Where the tokens come from, for the message.
    """

    def __init__(self, store: str) -> None:
        """Nothing is watched before the fit starts."""
        self.store = store
        self._now = (DATA, 0, time.monotonic())
        self._told = 0.0
        self._ended = threading.Event()
        self._peers: TCPStore | None = None
        self._rank, self._world = 0, 1

    def _enter(self, phase: str, step: int) -> None:
        self._now, self._told = (phase, step, time.monotonic()), 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the thread, now that the process group stands."""
        self._rank, self._world = trainer.global_rank, trainer.world_size
        if self._world > 1:
            place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            self._peers = TCPStore(*place, timeout=timedelta(seconds=30))
            self._beat(self._peers)  # before the first collective, so that every rank is known
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first batch is waited for."""
        self._enter(DATA, trainer.global_step + 1)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch came."""
        self._enter(STEP, trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The next batch is waited for."""
        self._enter(DATA, trainer.global_step + 1)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation reads and computes in one."""
        self._enter(VALIDATION, trainer.global_step)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **more: Any
    ) -> None:
        """Each batch of a validation is a sign of life."""
        self._enter(VALIDATION, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Back to training."""
        self._enter(DATA, trainer.global_step + 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching."""
        self._ended.set()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Name the rank that a broken connection led to.

        Raises:
            UserError: In place of the backend's error, when a rank of the run is gone.
        """
        if self._peers is not None and isinstance(exception, RuntimeError):
            behind = self._behind()
            if behind:
                raise UserError(behind) from exception
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(POLL):
            phase, step, since = self._now
            waited = time.monotonic() - since
            if phase == DATA and step and waited >= max(DATA_SECONDS, 2 * self._told):
                self._told = waited
                self._say(
                    f"no batch for {human_time(waited)}: {self.store} is slow or does not answer; "
                    "data.threads=8, a copy on a local disk or storage=int8 help"
                )
            if self._peers is not None:
                self._beat(self._peers)
                if phase != DATA and waited >= RANK_SECONDS:
                    behind = self._behind()
                    if behind and not self._ended.is_set():
                        self._say(behind, "error")
                        logging.shutdown()
                        os._exit(HUNG_CODE)  # the loop is in a collective that never returns

    def _beat(self, peers: TCPStore) -> None:
        """Give a sign of life and of the place in the run."""
        phase, step, _ = self._now
        sign = {"phase": phase, "step": step, "beat": time.monotonic()}
        with suppress(RuntimeError):  # rank 0, where the store is, is gone: _behind says so
            peers.set(f"{KEY}{self._rank}", json.dumps(sign))

    def _signs(self, peers: TCPStore) -> dict[int, dict[str, Any]]:
        """Return the last sign of each rank."""
        keys = {rank: f"{KEY}{rank}" for rank in range(self._world)}
        return {rank: json.loads(peers.get(k)) for rank, k in keys.items() if peers.check([k])}

    def _behind(self) -> str:
        """Say which ranks hold the run up, where they were last seen, and who waits in what.

        Returns:
            An empty text when every rank is alive and at the same place.
        """
        assert self._peers is not None
        phase, step, since = self._now
        try:
            before = self._signs(self._peers)
            time.sleep(SILENT)
            after = self._signs(self._peers)
        except RuntimeError:
            before = after = {0: {"phase": phase, "step": step}} if self._rank else {}
        names = []
        for rank, sign in after.items():
            at = f"{sign['phase']} of step {sign['step']}"
            late = sign["step"] < step or (sign["step"] == step and sign["phase"] == DATA != phase)
            if rank != self._rank and sign == before.get(rank):
                names.append(f"rank {rank} died or hangs, last seen in {at}")
            elif rank != self._rank and late:
                names.append(f"rank {rank} is behind, in {at}")
        if not names:
            return ""
        waited = human_time(time.monotonic() - since)
        return (
            f"{', '.join(names)}; rank {self._rank} waits in {phase} of step {step} since "
            f"{waited}: resume=auto goes on from the last checkpoint"
        )

    def _say(self, text: str, kind: str = "warning") -> None:
        log.warning(text)
        print(f"{kind}: {text}", file=sys.stderr, flush=True)
