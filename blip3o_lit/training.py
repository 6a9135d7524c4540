"""One training run from its typed config to its result: data, plan, fit, checkpoints, summary."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy

from blip3o_lit import checkpointing
from blip3o_lit import plan as planning
from blip3o_lit.callbacks.bad_steps import BadSteps
from blip3o_lit.callbacks.checkpoints import Checkpoints
from blip3o_lit.callbacks.ema import EmaUpdate
from blip3o_lit.callbacks.ranks import OneConfig
from blip3o_lit.callbacks.run_log import RunLog
from blip3o_lit.callbacks.stop import StopAtStep
from blip3o_lit.callbacks.watch import Watch
from blip3o_lit.checkpointing import AtomicCheckpointIO
from blip3o_lit.cluster import ranks
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.files import claimed
from blip3o_lit.config.secrets import masked
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.environment import keep_freed_memory, quiet_libraries
from blip3o_lit.footprint import units
from blip3o_lit.forecast import forecast, rank_bytes
from blip3o_lit.launcher import launch
from blip3o_lit.loggers import loggers
from blip3o_lit.module import TranslationModule
from blip3o_lit.overfit import FAILED_CODE, check_overfit, training_images
from blip3o_lit.relief import training_limit
from blip3o_lit.resume import (
    check_tokens,
    config_hash,
    finished_result,
    refuse_used,
    resolve_resume,
    say_resumed,
)
from blip3o_lit.run_files import (
    closing_table,
    console,
    is_rank_zero,
    remove_run,
    say_finished,
    say_how_to_resume,
    show_plan,
    write_result,
    write_run_files,
)
from blip3o_lit.token_source import token_store
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reader import TokenReader

# EX_TEMPFAIL of sysexits.h: the run was preempted and goes on when it is started again.
PREEMPTED_CODE = 75
INTERRUPTED_CODE = 130


def run_training(config: TrainConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Train by `config`.

    Args:
        config: The run's configuration.
        run_dir: Where everything that the run writes goes.
        overrides: The command line's overrides, for the record.

    Returns:
        The best held-out cosine, or None when the store has no validation split or the run stopped.

    Raises:
        UserError: For anything in the configuration, data or machine that the user can mend.
    """
    quiet_libraries()
    keep_freed_memory()
    run_dir = run_dir.resolve()
    if config.plan:
        for label, value in forecast(config, *open_data(config)):
            console.print(f"[bold]{label:>15}[/bold]  {value}", highlight=False, soft_wrap=True)
        return None
    with claimed(run_dir, "hydra.run.dir") if is_rank_zero() else nullcontext():
        return train_in(run_dir, config, overrides)


def train_in(run_dir: Path, config: TrainConfig, overrides: list[str]) -> float | None:
    """Train in a folder that no other process writes into; otherwise as `run_training`."""
    refuse_used(config, run_dir)
    device = choose_device(config)
    lightning_precision = planning.set_precision(config.precision.name, device.type)
    data, steps = open_data(config)
    if config.evaluation.overfit_at_least is not None:
        training_images(data)
    resumed = resolve_resume(config, run_dir)
    if resumed:
        if isinstance(data.train, TokenReader):  # a stream goes on in another store too
            check_tokens(resumed, data.train.content_hash)
        finished = finished_result(config, run_dir, resumed, steps)
        if finished is not None:
            return end_again(run_dir, finished)
    if config.micro_batch_size is None:
        config.micro_batch_size = planning.fitting_micro_batch(config, data.shape, device)
    trainer = build_trainer(config, data, steps, lightning_precision, run_dir)
    accumulation = data.accumulation(trainer.world_size, config.micro_batch_size)
    trainer.accumulate_grad_batches = accumulation
    trainer.val_check_interval = accumulation * config.evaluation.every
    the_plan = make_plan(config, data, steps, trainer, run_dir, device)
    if is_rank_zero():
        if resumed:
            say_resumed(config, resumed)
        if not config.dry_run:
            if config.overwrite:
                remove_run(run_dir)
            write_run_files(config, run_dir, overrides, data.train.content_hash)
        show_plan(the_plan, resumed)
    if config.dry_run:
        console.print("dry run: everything was built, no step was taken")
        return None
    module = TranslationModule(
        config,
        masked(asdict(config)),
        data.shape,
        data.condition_standardizer,
        data.target_standardizer,
        {"path": masked(str(data.store_path)), "hash": data.train.content_hash},
        steps,
    )
    if config.model.compile:
        module.network.compile_blocks()
    return fit(config, trainer, module, data, the_plan, resumed, run_dir)


def end_again(run_dir: Path, result: dict[str, Any]) -> float | None:
    """End as the finished run of this folder did, without touching it; returns its best cosine."""
    if is_rank_zero():
        say_finished(run_dir, result)
    if not result.get("overfit", {}).get("passed", True):
        sys.exit(FAILED_CODE)
    return result["best"]["cosine"]


def choose_device(config: TrainConfig) -> torch.device:
    """Return the kind of device that the trainer will use, or refuse one that is not there."""
    wanted = config.trainer.accelerator
    if wanted in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={wanted}: this machine has no CUDA GPU: use cpu")
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps: this machine has no Apple GPU: use cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", launch().local)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def open_data(config: TrainConfig) -> tuple[TokenDataModule, int]:
    """Open the token store and return it with the number of optimizer steps."""
    data = TokenDataModule(
        config.data,
        config.mode,
        token_store(config.data),
        seed=config.seed,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        validation_images=config.evaluation.images,
    )
    data.open()
    return data, data.steps_for(config.trainer.max_steps, config.trainer.max_epochs)


def build_trainer(
    config: TrainConfig, data: TokenDataModule, steps: int, precision: str, run_dir: Path
) -> Trainer:
    """Build the Trainer without callbacks and loggers; they come when the run is sure to start."""
    name = config.strategy.name
    if name == "fsdp2" and config.trainer.accelerator == "mps":
        raise UserError("strategy=fsdp2 needs CUDA GPUs or a CPU: use strategy=single")
    if name == "fsdp2" and config.model.compile:
        raise UserError("model.compile=true does not work with strategy=fsdp2: drop one of them")
    devices: Any = config.trainer.devices
    devices = int(devices) if devices.isdigit() else "auto"
    single = config.trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if name == "single" or (devices == "auto" and single):
        devices = 1
    count = torch.cuda.device_count() if devices == "auto" else devices
    strategy: Any = "auto"
    backend = "gloo" if single else "nccl"
    if name == "fsdp2":
        from blip3o_lit.sharding import Fsdp2Strategy  # DTensor takes seconds to import

        strategy = Fsdp2Strategy(config.strategy.consolidated, backend)
    if name == "ddp" or (name == "auto" and devices not in (1, "auto")):
        strategy = DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
    return Trainer(
        accelerator=config.trainer.accelerator,
        devices=devices,
        num_nodes=config.trainer.num_nodes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]
        plugins=[AtomicCheckpointIO(), ranks(launch(), count, config.trainer.num_nodes)],
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=None,
        limit_val_batches=None if data.validation else 0,
        use_distributed_sampler=False,
        default_root_dir=run_dir,
    )


def make_plan(
    config: TrainConfig,
    data: TokenDataModule,
    steps: int,
    trainer: Trainer,
    run_dir: Path,
    device: torch.device,
) -> planning.Plan:
    """Work out the figures of the run."""
    parameters, flops = planning.count_parameters(config.model, data.shape)
    micro = config.micro_batch_size or 1
    low = 4 if config.precision.name in ("fp32", "tf32") else 2
    image = planning.activation_bytes(config.model, data.shape.target.tokens, low)
    many = trainer.world_size > 1
    kind = "fsdp2" if config.strategy.name == "fsdp2" else "ddp" if many else "single"
    accumulated = trainer.accumulate_grad_batches > 1
    run = (config.precision.name, config.optimizer.name, trainer.world_size, accumulated)
    states = rank_bytes(kind, units(config.model, data.shape), *run)
    return planning.Plan(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=config.precision.name,
        strategy=config.strategy.name,
        world=trainer.world_size,
        parameters=parameters,
        forward_flops=flops,
        batch=config.batch_size,
        micro_batch=micro,
        accumulation=trainer.accumulate_grad_batches,
        steps=steps,
        train_images=len(data.train),
        validation_images=len(data.validation) if data.validation else 0,
        tokens=f"{data.store_path} ({config.mode.name})",
        run_dir=run_dir,
        shape=data.shape,
        state_gib=states / 2**30,
        activation_gib=micro * image / 2**30,
    )


def fit(
    config: TrainConfig,
    trainer: Trainer,
    module: TranslationModule,
    data: TokenDataModule,
    the_plan: planning.Plan,
    resumed: Path | None,
    run_dir: Path,
) -> float | None:
    """Train, then write result.json and say what comes next."""
    stop = StopAtStep()
    peak = planning.peak_flops(choose_device(config), config.precision.name) * the_plan.world
    tokens = config.batch_size * data.shape.target.tokens
    run_log = RunLog(config.trainer.log_every, tokens, the_plan.step_flops, peak)
    kept = config.checkpoint
    folder = run_dir / "checkpoints"
    checkpoints = Checkpoints(folder, kept.every, kept.keep, "val/cosine", config.evaluation.every)
    digest = rank_digest(config, data, run_dir)
    bad_steps = BadSteps(config.trainer.log_every, config.trainer.max_bad_steps)
    average = EmaUpdate(config.optimizer.ema_decay)
    callbacks = [OneConfig(digest), average, run_log, bad_steps, stop]
    trainer.callbacks.extend(callbacks)  # type: ignore[attr-defined]
    if config.evaluation.patience and data.validation:
        from lightning.pytorch.callbacks import EarlyStopping

        patience = config.evaluation.patience
        trainer.callbacks.append(EarlyStopping("val/cosine", mode="max", patience=patience))  # type: ignore[attr-defined]
    trainer.callbacks += [checkpoints, Watch(masked(str(data.store_path)))]  # type: ignore[attr-defined]
    start = 0
    if resumed:
        start = int(checkpointing.facts(resumed)["global_step"])
    if is_rank_zero():
        trainer.loggers = loggers(config, run_dir, resumed, start)
    started = time.perf_counter()
    with stop.listening(), training_limit(config, the_plan):
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    seconds = time.perf_counter() - started
    early = stop.received is None and trainer.global_step < the_plan.steps
    finished = early or trainer.global_step >= the_plan.steps
    solver = config.solver.label
    bar, overfit = config.evaluation.overfit_at_least, None
    if bar is not None and stop.received is None:
        module.to(trainer.strategy.root_device)
        overfit = check_overfit(config, module.translator, data, bar)
    if trainer.is_global_zero:
        write_result(trainer, run_log, checkpoints, run_dir, seconds, finished, solver, overfit)
    if stop.received is not None and not finished:
        if trainer.is_global_zero:
            say_how_to_resume(run_dir, trainer.global_step)
        sys.exit(INTERRUPTED_CODE if stop.received == signal.SIGINT else PREEMPTED_CODE)
    if trainer.is_global_zero:
        if early:
            console.print(
                f"stopped early at step {trainer.global_step} of {the_plan.steps}: no better "
                f"held-out cosine in {config.evaluation.patience} validations",
                highlight=False,
                soft_wrap=True,
            )
        closing_table(trainer, run_log, checkpoints, solver, run_dir, seconds)
        if overfit is not None:
            console.print(str(overfit), highlight=False, soft_wrap=True)
    if overfit is not None and not overfit.passed:
        sys.exit(FAILED_CODE)
    return checkpoints.best_score


def rank_digest(config: TrainConfig, data: TokenDataModule, run_dir: Path) -> str:
    """Return a hash of all that the ranks of a run must agree on."""
    facts = [config_hash(config), config.micro_batch_size, data.train.content_hash, run_dir.name]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
