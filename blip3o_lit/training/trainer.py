"""The Trainer of a run and its callbacks; neither is changed afterwards."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import Strategy

from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.launcher import launch, number
from blip3o_lit.base.secrets import masked
from blip3o_lit.budget.machine import Machine, peak_flops
from blip3o_lit.budget.plan import Plan
from blip3o_lit.checkpoints.background import Background
from blip3o_lit.checkpoints.files import AtomicCheckpointIO
from blip3o_lit.checkpoints.mirror import Mirror
from blip3o_lit.checkpoints.resume import config_hash
from blip3o_lit.checkpoints.snapshots import FOLDER as AVERAGES
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.models.precision import AUTO, bf16_is_faster
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.training.callbacks.averages import Snapshots
from blip3o_lit.training.callbacks.bad_steps import BadSteps
from blip3o_lit.training.callbacks.checkpoints import DIRECTIONS, Checkpoints
from blip3o_lit.training.callbacks.garbage import Garbage
from blip3o_lit.training.callbacks.profile import Profile
from blip3o_lit.training.callbacks.ranks import OneConfig
from blip3o_lit.training.callbacks.run_log import RunLog
from blip3o_lit.training.callbacks.slow_data import SlowData
from blip3o_lit.training.callbacks.stacks import Stacks
from blip3o_lit.training.callbacks.stop import StopAtStep
from blip3o_lit.training.ddp import DdpStrategy
from blip3o_lit.training.own_parts import own_callbacks
from blip3o_lit.training.trainer_arguments import trainer_with


def machine_of(config: TrainConfig, machine: Machine, ranks: FirstRank = ALONE) -> Machine:
    """Return a machine with what torchrun or srun started there, its number format measured."""
    this, device = launch(), machine.device
    if config.precision.name == AUTO and not ranks.finds(lambda: bf16_is_faster(device)):
        machine = replace(machine, precision="fp32")
    if this.by not in ("torchrun", "srun") or this.world is None:
        return machine
    if this.by == "srun" and "SLURM_STEP_NUM_NODES" in os.environ:
        processes = this.world // max(1, number(os.environ, "SLURM_STEP_NUM_NODES"))
    else:
        variable = "LOCAL_WORLD_SIZE" if this.by == "torchrun" else "SLURM_STEP_TASKS_PER_NODE"
        tasks = os.environ.get(variable, "").partition("(")[0]  # Slurm writes 4(x2)
        processes = int(tasks) if tasks.isdigit() else this.world // config.trainer.num_nodes
    processes = max(1, processes)
    nodes = this.world // processes
    return replace(machine, launcher=this.by, processes=processes, nodes=nodes)


class Callbacks:
    """The callbacks of a run, and by name those that are asked for something after it."""

    def __init__(
        self, plan: Plan, data: TokenDataModule, run_dir: Path, resumed: Path | None = None
    ) -> None:
        config, place = plan.config, plan.placement
        every = config.trainer.log_every
        cuda = place.device == "cuda"
        device = torch.device("cuda", launch().local) if cuda else torch.device(place.device)
        peak = math.inf  # Rank 0 writes the rows, and alone measures a card that nobody knows.
        if launch().first:
            peak = place.world * peak_flops(device, plan.device_name, place.precision)
        tokens = config.batch_size * data.shape.target.tokens
        flops = plan.step_flops + data.tower_flops * config.batch_size
        self.log = RunLog(every, tokens, flops, peak)
        self.stop = StopAtStep()
        mirror = config.checkpoint.mirror if launch().first else None
        self.mirror = Mirror(run_dir, mirror) if mirror else None
        self.checkpoints = Checkpoints(
            run_dir / "checkpoints",
            config.checkpoint.every,
            config.checkpoint.keep,
            config.evaluation.every,
            config.evaluation.best_by,
            Background(config.checkpoint.asynchronous),
            self.mirror.changed if self.mirror else None,
        )
        # The check of the ranks comes first, the saving last but for the wait for data.
        self.in_order: list[Callback] = [
            OneConfig(rank_digest(plan, data, run_dir)),
            self.log,
            BadSteps(every, config.trainer.max_bad_steps),
            self.stop,
            Garbage(),
        ]
        if place.world > 1:
            self.in_order.append(Stacks(flight_records(run_dir), 0.8 * config.strategy.timeout))
        if config.trainer.profile:
            self.in_order.append(Profile(run_dir / "profile", *config.trainer.profile))
        if config.evaluation.patience and data.validation:
            patience = config.evaluation.patience
            best_by = config.evaluation.best_by
            stopping = EarlyStopping(f"val/{best_by}", mode=DIRECTIONS[best_by], patience=patience)
            self.in_order.append(stopping)
        self.in_order += own_callbacks(config.callbacks)
        widths, count = config.optimizer.ema_profiles, config.optimizer.ema_snapshots
        if widths:
            every, saves = max(1, math.ceil(plan.steps / count)), self.checkpoints.saves
            folder = run_dir / AVERAGES
            self.in_order.append(Snapshots(folder, every, widths, saves, resumed))
        self.in_order += [self.checkpoints, SlowData(masked(str(data.store_path)))]


def rank_digest(plan: Plan, data: TokenDataModule, run_dir: Path) -> str:
    """Return a hash of all that the ranks of a run must agree on."""
    micro_batch = plan.placement.micro_batch
    facts = [config_hash(plan.config), micro_batch, data.train.content_hash, run_dir.name]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def build_trainer(
    plan: Plan,
    ranks: ClusterEnvironment,
    callbacks: Callbacks,
    loggers: list[Any],
    run_dir: Path,
) -> Trainer:
    place = plan.placement
    # On a CPU "medium" may compute fp32 products in bf16.
    torch.set_float32_matmul_precision(place.precision.matmul)
    own: dict[str, Any] = dict(
        accelerator=place.device,
        devices=place.devices,
        num_nodes=place.nodes,
        strategy=_strategy(plan, run_dir, callbacks.checkpoints.saves),
        precision=place.precision.lightning,
        plugins=[AtomicCheckpointIO(callbacks.checkpoints.saves), ranks],
        callbacks=callbacks.in_order,
        logger=loggers or False,
        accumulate_grad_batches=place.accumulation,
        val_check_interval=place.accumulation * plan.config.evaluation.every,
        max_steps=plan.steps,
        max_epochs=-1,
        deterministic=plan.config.trainer.deterministic,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        limit_val_batches=None if plan.validation_images else 0,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )
    trainer = trainer_with(own, plan.config.trainer.extra, run_dir)
    assert trainer.world_size == place.world, (trainer.world_size, place)
    # It asks all ranks after a SIGTERM in each micro-batch, through the device; so does `stop.py`,
    # in each step and without.
    assert hasattr(trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor")
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    return trainer


def _strategy(plan: Plan, run_dir: Path, saves: Background) -> Strategy | str:
    place, config = plan.placement, plan.config.strategy
    if place.strategy == "single":
        return "auto"
    backend = "nccl" if place.device == "cuda" else "gloo"
    timeout = timedelta(seconds=config.timeout)
    if backend == "nccl":
        _record_collectives(flight_records(run_dir))
    if place.strategy == "ddp":
        return DdpStrategy(backend, timeout)
    from blip3o_lit.training.fsdp2 import Fsdp2Strategy  # DTensor takes seconds to import

    return Fsdp2Strategy(config, backend, timeout, saves)


def flight_records(run_dir: Path) -> Path:
    """Return the folder of what is known of a rank that hangs: its stacks, NCCL's last calls."""
    return run_dir / "flight-recorder"


def _record_collectives(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for variable, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3"),  # a collective that hangs is an error, in time
        ("TORCH_FR_DUMP_TEMP_FILE", str(folder / "rank_")),
        ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", str(folder / "rank_")),  # its name before torch 2.10
    ):
        os.environ.setdefault(variable, value)
