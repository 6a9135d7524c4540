"""Which checkpoints a run keeps: every N steps, the best held-out one, and the last."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer

from blip3o_lit.checkpoints.background import Background
from blip3o_lit.checkpoints.in_place import remove, second_name, tidy

STEP_NAME = "step-{:08d}.ckpt"
DIRECTIONS = {"cosine": "max", "timed_loss": "min"}
"""Of the scores by which a validation can be the best."""


class Checkpoints(Callback):
    """Keeps `step-*.ckpt` (the newest few), `best.ckpt` and `last.ckpt` under one folder.

    A step that is validated is saved after its validation: a run that is killed in between does the
    validation again, and one that goes on from the file has nothing left to do at that step.

    `last.ckpt` is a second name of the newest step file, not a second write, and so is `best.ckpt`
    of a step that is saved anyway. `saves` does all of it, while training goes on or not. Only step
    files that the run itself has written are removed again: their steps stand in every checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        keep: int,
        validate_every: int,
        best_by: str,
        saves: Background,
        saved: Callable[[], None] | None = None,
    ) -> None:
        """Plan the files: `keep` step files stay beside best and last, all with -1.

        `best_by` is one of DIRECTIONS; `best_score` is the cosine of the best step all the same.
        `saved` is called when a save is done and what it replaces is removed.
        """
        self.folder = folder
        self.every = every
        self.keep = keep
        self.validate_every = validate_every
        self.saves, self.saved = saves, saved
        self.best_by = best_by
        self.best_score: float | None = None
        self._best_value = math.inf
        self.best_step: int | None = None
        self._saved_step = -1
        self._own: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {
            "best_score": self.best_score,
            "best_step": self.best_step,
            "best_by": self.best_by,
            "best_value": self._best_value,
            "own": self._own[:],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]
        self.best_step = state_dict["best_step"]
        # The rest is not in checkpoints of earlier versions, whose best had the highest cosine.
        if state_dict.get("best_by", "cosine") == self.best_by:  # else what comes next is the best
            earlier = math.inf if self.best_score is None else -self.best_score
            self._best_value = state_dict.get("best_value", earlier)
        self._own = list(state_dict.get("own", []))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            tidy(self.folder)
            newest = self.folder / STEP_NAME.format(trainer.global_step)
            if self.best_step == trainer.global_step and newest.exists():
                second_name(newest, self.folder / "best.ckpt")  # likewise
        self._prune(trainer)  # a kill may have come between a save and the removal

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == trainer.max_steps:
            trainer.val_check_batch = 1  # The last step is always validated.
        planned = step % self.validate_every == 0 or step == trainer.max_steps
        if step == self._saved_step or (planned and trainer.enable_validation):
            return  # on_validation_end saves it.
        if trainer.should_stop:
            trainer.limit_val_batches = 0  # Lightning would validate a step that no plan names.
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        score, value = (
            float(trainer.callback_metrics.get(f"val/{name}", math.nan))
            for name in ("cosine", self.best_by)
        )
        value = value if DIRECTIONS[self.best_by] == "min" else -value
        if math.isfinite(value) and value < self._best_value:
            self.best_score, self.best_step = score, trainer.global_step
            self._best_value = value
            if not self._due(trainer):
                trainer.save_checkpoint(self.folder / "best.ckpt")
        if trainer.global_step != self._saved_step:
            self._save_if_due(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saves.wait()

    def _due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return step % self.every == 0 or step == trainer.max_steps or trainer.should_stop

    def _save_if_due(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if not self._due(trainer):
            return
        self._saved_step = step
        if self.keep >= 0:
            self._own.append(step)
        path = self.folder / STEP_NAME.format(step)
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            best = ["best.ckpt"] if step == self.best_step else []
            for name in (*best, "last.ckpt"):
                self.saves.do(partial(second_name, path, self.folder / name))
        self._prune(trainer)
        if trainer.is_global_zero and self.saved is not None:
            self.saves.do(self.saved)

    def _prune(self, trainer: Trainer) -> None:
        if self.keep < 0:
            return
        surplus = max(0, len(self._own) - self.keep)
        if trainer.is_global_zero:
            for step in self._own[:surplus]:
                self.saves.do(partial(remove, self.folder / STEP_NAME.format(step)))
        self._own = self._own[surplus:]
