"""The Trainer of a placement and the callbacks of a run; neither is changed afterwards."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import DDPStrategy, Strategy

from blip3o_lit.base.launcher import launch, number
from blip3o_lit.base.secrets import masked
from blip3o_lit.budget.machine import Machine, this_machine
from blip3o_lit.budget.placement import Placement
from blip3o_lit.budget.plan import Plan
from blip3o_lit.checkpoints.files import AtomicCheckpointIO
from blip3o_lit.checkpoints.resume import config_hash
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.training.callbacks.bad_steps import BadSteps
from blip3o_lit.training.callbacks.checkpoints import Checkpoints
from blip3o_lit.training.callbacks.ema import EmaUpdate
from blip3o_lit.training.callbacks.ranks import OneConfig
from blip3o_lit.training.callbacks.run_log import RunLog
from blip3o_lit.training.callbacks.slow_data import SlowData
from blip3o_lit.training.callbacks.stop import StopAtStep


def machine_of(config: TrainConfig) -> Machine:
    """Return this machine, with what torchrun or srun started on it.

    Raises:
        UserError: If the accelerator that was asked for is not there.
    """
    this, accelerator = launch(), config.trainer.accelerator
    if this.by not in ("torchrun", "srun") or this.world is None:
        return this_machine(accelerator)
    environment = os.environ
    variable = "LOCAL_WORLD_SIZE" if this.by == "torchrun" else "SLURM_STEP_TASKS_PER_NODE"
    given = environment.get(variable, "").partition("(")[0]
    processes = int(given) if given.isdigit() else this.world // config.trainer.num_nodes
    if this.by == "srun" and "SLURM_STEP_NUM_NODES" in environment:
        processes = this.world // max(1, number(environment, "SLURM_STEP_NUM_NODES"))
    processes = max(1, processes)
    return this_machine(accelerator, this.by, processes, this.world // processes)


def device_of(placement: Placement) -> torch.device:
    """Return this process's device."""
    if placement.device == "cuda":
        return torch.device("cuda", launch().local)
    return torch.device(placement.device)


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run, and by name those that are asked for something after it."""

    log: RunLog
    stop: StopAtStep
    checkpoints: Checkpoints
    in_order: list[Callback]
    """All of them: the check of the ranks first, the saving last but for the wait for data."""


def callbacks_of(
    config: TrainConfig, data: TokenDataModule, plan: Plan, peak: float, run_dir: Path
) -> Callbacks:
    """Build the callbacks of a run.

    Args:
        config: Its configuration.
        data: Its data, open.
        plan: Its figures.
        peak: FLOP/s of all its devices.
        run_dir: Where it writes.
    """
    every, saved = config.trainer.log_every, config.checkpoint
    tokens = config.batch_size * data.shape.target.tokens
    run_log = RunLog(every, tokens, plan.step_flops, peak)
    stop = StopAtStep()
    checkpoints = Checkpoints(
        run_dir / "checkpoints", saved.every, saved.keep, "val/cosine", config.evaluation.every
    )
    in_order: list[Callback] = [
        OneConfig(rank_digest(config, plan.placement, data, run_dir)),
        EmaUpdate(config.optimizer.ema_decay),
        run_log,
        BadSteps(every, config.trainer.max_bad_steps),
        stop,
    ]
    if config.evaluation.patience and data.validation:
        patience = config.evaluation.patience
        in_order.append(EarlyStopping("val/cosine", mode="max", patience=patience))
    in_order += [checkpoints, SlowData(masked(str(data.store_path)))]
    return Callbacks(run_log, stop, checkpoints, in_order)


def rank_digest(
    config: TrainConfig, placement: Placement, data: TokenDataModule, run_dir: Path
) -> str:
    """Return a hash of all that the ranks of a run must agree on."""
    facts = [config_hash(config), placement.micro_batch, data.train.content_hash, run_dir.name]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def build_trainer(
    config: TrainConfig,
    placement: Placement,
    ranks: ClusterEnvironment,
    callbacks: Callbacks,
    loggers: list[Any],
    steps: int,
    validates: bool,
    run_dir: Path,
) -> Trainer:
    """Build the Trainer of a placement.

    Args:
        config: The run's configuration.
        placement: Its layout.
        ranks: Ranks and meeting place of its processes.
        callbacks: See `callbacks_of`.
        loggers: Where metrics go; none on ranks that don't speak for the run.
        steps: Optimizer steps.
        validates: Whether there are held-out images.
        run_dir: Where it writes.
    """
    # On a CPU "medium" may compute fp32 products in bf16.
    torch.set_float32_matmul_precision(placement.precision.matmul)
    trainer = Trainer(
        accelerator=placement.device,
        devices=placement.devices,
        num_nodes=placement.nodes,
        strategy=_strategy(config, placement, run_dir),
        precision=placement.precision.lightning,  # type: ignore[arg-type]
        plugins=[AtomicCheckpointIO(), ranks],
        callbacks=callbacks.in_order,
        logger=loggers or False,
        accumulate_grad_batches=placement.accumulation,
        val_check_interval=placement.accumulation * config.evaluation.every,
        max_steps=steps,
        max_epochs=-1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validates else 0,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )
    assert trainer.world_size == placement.world, (trainer.world_size, placement)
    return trainer


def _strategy(config: TrainConfig, placement: Placement, run_dir: Path) -> Strategy | str:
    if placement.strategy == "single":
        return "auto"
    backend = "nccl" if placement.device == "cuda" else "gloo"
    timeout = timedelta(seconds=config.strategy.timeout)
    if backend == "nccl":
        _record_collectives(run_dir)
    if placement.strategy == "ddp":
        return DDPStrategy(
            process_group_backend=backend, timeout=timeout, gradient_as_bucket_view=True
        )
    from blip3o_lit.training.fsdp2 import Fsdp2Strategy  # DTensor takes seconds to import

    return Fsdp2Strategy(config.strategy.consolidated, backend, timeout)


def flight_records(run_dir: Path) -> Path:
    """Return the folder into which NCCL's flight recorder writes when a collective times out."""
    return run_dir / "flight-recorder"


def _record_collectives(run_dir: Path) -> None:
    folder = flight_records(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for variable, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_")),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_")),  # its name before torch 2.10
    ):
        os.environ.setdefault(variable, value)
