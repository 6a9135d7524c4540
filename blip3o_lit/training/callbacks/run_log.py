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
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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

    def __init__(
        self, every: int, tokens_per_step: int, flops_per_step: float, peak: float
    ) -> None:
        """Set the scale of the figures.

        Args:
            every: Steps between two rows.
            tokens_per_step: Target tokens of a global batch.
            flops_per_step: Matrix arithmetic of a step, over all processes.
            peak: Arithmetic a second that all devices could reach at best.
        """
        self.every = every
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak = peak
        self.last: dict[str, float] = {}
        self.first_step_seconds: float | None = None
        self._console = Console()
        self._health = RunHealth()
        self._progress: Progress | None = None
        self._step = self._logged_step = 0
        self._waited = 0.0
        self._paused = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks and, on a terminal, the progress bar."""
        self._step = self._logged_step = self._first_step = trainer.global_step
        self._started = self._row_started = self._waiting_since = time.perf_counter()
        if trainer.is_global_zero and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[values]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                "training", total=trainer.max_steps, completed=self._step, values=""
            )
            self._progress.start()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count the time since the last batch as waiting for data."""
        self._waited += time.perf_counter() - self._waiting_since

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log a row when one is due."""
        step = trainer.global_step
        if step != self._step:
            self._step = step
            if self.first_step_seconds is None:
                self.first_step_seconds = time.perf_counter() - self._started
            if self._progress is not None:
                self._progress.update(self._task, completed=step)
            if step % self.every == 0 or step == trainer.max_steps:
                self._row(trainer, pl_module, step)
        self._waiting_since = time.perf_counter()

    def _row(self, trainer: Trainer, module: Any, step: int) -> None:
        values = module.drain()
        now = time.perf_counter()
        elapsed = max(now - self._row_started - self._paused, 1e-9)
        rate = (step - self._logged_step) / elapsed
        values["train/grad_norm"] = float(module.gradient_norm)
        values["train/lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        values["train/tokens_per_s"] = rate * self.tokens_per_step
        values["train/mfu"] = rate * self.flops_per_step / self.peak
        values["train/memory_gib"] = memory_gib(module.device)
        values["train/data_wait"] = min(1.0, self._waited / elapsed)
        self.last = values
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        if trainer.is_global_zero:
            self._say(trainer, values, step, rate)
            for warning in self._health.observe(values):
                log.warning(warning)
                self._console.print(f"warning: {warning}", style="yellow", highlight=False)
        self._logged_step, self._row_started = step, now
        self._waited = self._paused = 0.0

    def _say(self, trainer: Trainer, values: dict[str, float], step: int, rate: float) -> None:
        cosine = values.get("train/cosine")
        core = f"loss {values['train/loss']:.4f}"
        core += f" cos {cosine:.4f}" if cosine is not None else ""
        core += f" gn {values['train/grad_norm']:.2f} lr {values['train/lr']:.2e}"
        speed = (
            f"{human_count(values['train/tokens_per_s'])} tok/s mfu {values['train/mfu']:.0%} "
            f"mem {values['train/memory_gib']:.1f}GiB data {values['train/data_wait']:.0%}"
        )
        left = human_time((int(trainer.max_steps) - step) / rate)
        line = f"step {step}/{trainer.max_steps} {core} | {speed} eta {left}"
        log.info(line)
        if self._progress is None:
            print(line, flush=True)
        else:
            self._progress.update(self._task, values=f"{core} | {speed}")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take validation out of the training throughput."""
        self._validation_started = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the held-out images score."""
        took = time.perf_counter() - self._validation_started
        self._paused += took
        self._waiting_since = time.perf_counter()
        metrics = trainer.callback_metrics
        values = {key: float(value) for key, value in metrics.items() if key.startswith("val/")}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        cosine = values.get("val/cosine")
        if cosine is None or not trainer.is_global_zero:
            return
        label = f"step {trainer.global_step} validation cosine {cosine:.4f}"
        line = f"{label} ({human_time(took)})"
        log.info(line)
        self._console.print(line, highlight=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the progress bar."""
        if self._progress is not None:
            self._progress.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the progress bar, so that the error can be read."""
        if self._progress is not None:
            self._progress.stop()
