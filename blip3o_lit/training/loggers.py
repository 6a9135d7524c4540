"""Where a run's metrics go: metrics.csv always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from blip3o_lit.base.secrets import masked
from blip3o_lit.checkpoints.metrics_csv import MetricsCsv
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.training.own_parts import own_loggers


def loggers(config: TrainConfig, run_dir: Path, resumed: Path | None, step: int) -> list[Any]:
    """Return metrics.csv and the loggers that were asked for; `step` is that of `resumed`."""
    earlier_run = resumed.parent.parent if resumed else None
    places: list[Any] = [MetricsCsv(run_dir, earlier_run, step)]
    if config.logger.tensorboard:
        from lightning.pytorch.loggers import TensorBoardLogger

        places.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if config.logger.wandb and os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes"):
        print("WANDB_DISABLED is set: this run is not logged to W&B")
    elif config.logger.wandb:
        places.append(_wandb(config, run_dir))
    return places + own_loggers(config, run_dir)


def _wandb(config: TrainConfig, run_dir: Path) -> Any:
    """Start a run at Weights & Biases now, so that a missing key ends nothing that has begun."""
    from lightning.pytorch.loggers import WandbLogger
    from wandb.errors import Error as WandbError

    if not os.environ.get("WANDB_MODE", "").strip():
        os.environ.pop("WANDB_MODE", None)
    offline = config.logger.wandb_offline or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
    try:
        logger = WandbLogger(
            save_dir=run_dir,
            project=config.logger.wandb_project,
            name=config.logger.wandb_name,
            offline=offline,
            config=masked(asdict(config)),
        )
        _ = logger.experiment
    except (WandbError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"logger=wandb can't start ({reason}): mend it, or set logger.wandb_offline=true or "
            "WANDB_MODE=offline, or choose logger=tensorboard"
        ) from error
    return logger
