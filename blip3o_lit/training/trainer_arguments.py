"""`trainer.extra`: arguments of Lightning's Trainer that this project passes on as they are."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler

from blip3o_lit.config.errors import UserError, nearest, one_of
from blip3o_lit.config.trainer import INSTEAD

PROFILERS = {"simple": SimpleProfiler, "advanced": AdvancedProfiler, "pytorch": PyTorchProfiler}
CUTS = ("fast_dev_run", "limit_train_batches", "limit_val_batches", "overfit_batches")
CUTS += ("max_time", "barebones")
"""Arguments with which a run is no whole one."""


def passed() -> dict[str, Any]:
    """Return the arguments that pass, by name, with Lightning's defaults."""
    parameters = inspect.signature(Trainer.__init__).parameters
    names = parameters.keys() - {"self"} - INSTEAD.keys()
    return {name: parameters[name].default for name in sorted(names)}


def check_extra(extra: dict[str, Any]) -> None:
    """Raise a UserError for an argument that the Trainer lacks, with the one that was meant."""
    names = passed()
    for name in extra:
        if name not in names:
            guess = nearest(name, [*names, *INSTEAD])
            guess = INSTEAD.get(guess) or (f"trainer.extra.{guess}" if guess else "")
            hint = f"did you mean {guess}?" if guess else f"choose from {', '.join(names)}"
            raise UserError(f"trainer.extra.{name} is no argument of Lightning's Trainer: {hint}")
    if extra.get("profiler") is not None:
        one_of("trainer.extra.profiler", str(extra["profiler"]), PROFILERS)


def cut_by(extra: dict[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that cut a run short: its scores are no whole run's."""
    defaults = passed()
    given = {name: value for name, value in extra.items() if name in CUTS and value is not None}
    all_batches = [name for name, value in given.items() if isinstance(value, float) and value == 1]
    return {
        name: value
        for name, value in given.items()
        if value != defaults[name] and name not in all_batches
    }


def trainer_with(own: dict[str, Any], extra: dict[str, Any], run_dir: Path) -> Trainer:
    """Return the Trainer of this project's own arguments and the user's."""
    own, extra = dict(own), dict(extra)
    if extra.get("profiler") is not None:
        name = str(extra["profiler"])
        extra["profiler"] = PROFILERS[name](dirpath=run_dir / "profile", filename=name)
    if any(name in extra for name in ("limit_train_batches", "overfit_batches")):
        own["max_epochs"] = 1  # a run is one epoch: it ends there, and does not begin again
    if extra.get("barebones"):
        own["logger"] = False
    try:
        return Trainer(**{**own, **extra})
    except (MisconfigurationException, ValueError, TypeError) as error:
        if not extra:
            raise
        words = ", ".join(f"trainer.extra.{name}" for name in extra)
        raise UserError(f"{words}: Lightning refuses: {' '.join(str(error).split())}") from error
