"""What a run says while it trains: a progress bar on a terminal, one metric line otherwise.

Every logged row has the loss, cosine, gradient norm, learning rate, throughput, the share of the
peak that the arithmetic reaches (MFU), memory, and the share of the time spent waiting for data.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from blip3o_lit.base.units import human_count, human_time
from blip3o_lit.training.callbacks.health import RunHealth

log = logging.getLogger("blip3o_lit")


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of the device, or of the process on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (2**30 if sys.platform == "darwin" else 2**20)


class RunLog(Callback):
    """Measures, logs and prints every N steps."""

    def __init__(self, every: int, step_tokens: int, step_flops: float, peak: float) -> None:
        """Set the scale of the figures; `peak` is in FLOP/s, over all devices."""
        self.every = every
        self.step_tokens, self.step_flops, self.peak = step_tokens, step_flops, peak
        self.last: dict[str, float] = {}
        self.first_step_seconds: float | None = None
        self._console = Console()
        self._health = RunHealth()
        self._progress: Progress | None = None
        self._waited = self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged_step = trainer.global_step
        self._started = self._row_started = self._waiting_since = time.perf_counter()
        if trainer.is_global_zero and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "", total=trainer.max_steps, completed=trainer.global_step
            )
            self._progress.start()

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._waited += time.perf_counter() - self._waiting_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            step = trainer.global_step
            if self.first_step_seconds is None:
                self.first_step_seconds = time.perf_counter() - self._started
            if self._progress is not None:
                self._progress.update(self._task, completed=step)
            if step % self.every == 0 or step == trainer.max_steps:
                self._log_row(trainer, pl_module, step)
        self._waiting_since = time.perf_counter()

    def _log_row(self, trainer: Trainer, module: Any, step: int) -> None:
        values = module.take_means()
        now = time.perf_counter()
        elapsed = max(now - self._row_started - self._paused, 1e-9)
        rate = (step - self._logged_step) / elapsed
        values["train/grad_norm"] = float(module.gradient_norm)
        values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        values["train/tokens_per_s"] = rate * self.step_tokens
        values["train/mfu"] = rate * self.step_flops / self.peak
        values["train/memory_gib"] = memory_gib(module.device)
        values["train/data_wait"] = min(1.0, self._waited / elapsed)
        self.last = values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if trainer.is_global_zero:
            self._print_row(values, step, trainer.max_steps, rate)
            for warning in self._health.observe(values):
                log.warning(warning)
                self._console.print(f"warning: {warning}", style="yellow", highlight=False)
        self._logged_step, self._row_started = step, now
        self._waited = self._paused = 0.0

    def _print_row(self, values: dict[str, float], step: int, steps: int, rate: float) -> None:
        cosine = f" cos {values['train/cosine']:.4f}" if "train/cosine" in values else ""
        text = (
            f"loss {values['train/loss']:.4f}{cosine} gn {values['train/grad_norm']:.2f} "
            f"lr {values['train/lr']:.2e} | {human_count(values['train/tokens_per_s'])} tok/s "
            f"mfu {values['train/mfu']:.0%} mem {values['train/memory_gib']:.1f}GiB "
            f"data {values['train/data_wait']:.0%}"
        )
        line = f"step {step}/{steps} {text} eta {human_time((steps - step) / rate)}"
        log.info(line)
        if self._progress is None:
            print(line, flush=True)
        else:
            self._progress.update(self._task, description=text)

    def on_validation_start(self, *args: Any, **kwargs: Any) -> None:
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._waiting_since = time.perf_counter()
        seconds = self._waiting_since - self._validation_started
        self._paused += seconds
        metrics = trainer.callback_metrics
        values = {key: float(value) for key, value in metrics.items() if key.startswith("val/")}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if "val/cosine" in values and trainer.is_global_zero:
            label = f"step {trainer.global_step} validation cosine {values['val/cosine']:.4f}"
            line = f"{label} ({human_time(seconds)})"
            log.info(line)
            self._console.print(line, highlight=False)

    def _close(self, *args: Any, **kwargs: Any) -> None:
        if self._progress is not None:
            self._progress.stop()  # so that an error can be read

    on_train_end = on_exception = _close
