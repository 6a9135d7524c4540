"""One training run from its typed config to its result: data, plan, fit, checkpoints, summary."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Trainer

from blip3o_lit.base.files import claimed
from blip3o_lit.base.launcher import launch
from blip3o_lit.base.secrets import masked
from blip3o_lit.budget.forecast import forecast
from blip3o_lit.budget.machine import peak_flops
from blip3o_lit.budget.out_of_memory import training_limit
from blip3o_lit.budget.placement import resolve
from blip3o_lit.budget.plan import Plan, make_plan
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.resume import (
    check_tokens,
    finished_result,
    refuse_used,
    resolve_resume,
    say_resumed,
)
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.testbeds.token_source import token_store
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.training.cluster import ranks
from blip3o_lit.training.environment import quiet_libraries
from blip3o_lit.training.loggers import loggers
from blip3o_lit.training.module import TranslationModule
from blip3o_lit.training.overfit import FAILED_CODE, check_overfit, training_images
from blip3o_lit.training.run_files import (
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
from blip3o_lit.training.trainer import (
    Callbacks,
    build_trainer,
    callbacks_of,
    device_of,
    flight_records,
    machine_of,
)

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
    machine = machine_of(config)
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
    placement = resolve(config, data.shape, machine)
    data.micro_batch_size = placement.micro_batch
    cluster = ranks(launch(), placement.devices, placement.nodes)
    plan = make_plan(config, data, steps, placement, machine, run_dir)
    if is_rank_zero():
        if resumed:
            say_resumed(config, resumed)
        if not config.dry_run:
            if config.overwrite:
                remove_run(run_dir)
            write_run_files(config, run_dir, overrides, data.train.content_hash)
        show_plan(plan, resumed)
    if config.dry_run:
        console.print("dry run: everything was built, no step was taken")
        return None
    module = TranslationModule(
        config,
        placement,
        masked(asdict(config)),
        data.shape,
        data.condition_standardizer,
        data.target_standardizer,
        {"path": masked(str(data.store_path)), "hash": data.train.content_hash},
        steps,
    )
    if config.model.compile:
        module.network.compile_blocks()
    device = device_of(placement)
    peak = placement.world * peak_flops(device, machine.name, placement.precision)
    callbacks = callbacks_of(config, data, plan, peak, run_dir)
    start = int(checkpointing.facts(resumed)["global_step"]) if resumed else 0
    places = loggers(config, run_dir, resumed, start) if is_rank_zero() else []
    validates = data.validation is not None
    trainer = build_trainer(
        config, placement, cluster, callbacks, places, steps, validates, run_dir
    )
    return fit(config, trainer, callbacks, module, data, plan, resumed, run_dir)


def end_again(run_dir: Path, result: dict[str, Any]) -> float | None:
    """End as the finished run of this folder did, without touching it; returns its best cosine."""
    if is_rank_zero():
        say_finished(run_dir, result)
    if not result.get("overfit", {}).get("passed", True):
        sys.exit(FAILED_CODE)
    return result["best"]["cosine"]


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


def fit(
    config: TrainConfig,
    trainer: Trainer,
    callbacks: Callbacks,
    module: TranslationModule,
    data: TokenDataModule,
    plan: Plan,
    resumed: Path | None,
    run_dir: Path,
) -> float | None:
    """Train, then write result.json and say what comes next.

    Returns:
        The best held-out cosine, None without one; a run that was stopped exits.
    """
    stop, checkpoints = callbacks.stop, callbacks.checkpoints
    started = time.perf_counter()
    with stop.listening(), training_limit(config, plan), lost_ranks(config, trainer, run_dir):
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    seconds = time.perf_counter() - started
    early = stop.received is None and trainer.global_step < plan.steps
    finished = early or trainer.global_step >= plan.steps
    solver = config.solver.label
    bar, overfit = config.evaluation.overfit_at_least, None
    if bar is not None and stop.received is None:
        module.to(trainer.strategy.root_device)
        overfit = check_overfit(config, module.translator, data, bar)
    if trainer.is_global_zero:
        write_result(
            trainer, callbacks.log, checkpoints, run_dir, seconds, finished, solver, overfit
        )
    if stop.received is not None and not finished:
        if trainer.is_global_zero:
            say_how_to_resume(run_dir, trainer.global_step)
        sys.exit(INTERRUPTED_CODE if stop.received == signal.SIGINT else PREEMPTED_CODE)
    if trainer.is_global_zero:
        if early:
            console.print(
                f"stopped early at step {trainer.global_step} of {plan.steps}: no better "
                f"held-out cosine in {config.evaluation.patience} validations",
                highlight=False,
                soft_wrap=True,
            )
        closing_table(trainer, callbacks.log, checkpoints, solver, run_dir, seconds)
        if overfit is not None:
            console.print(str(overfit), highlight=False, soft_wrap=True)
    if overfit is not None and not overfit.passed:
        sys.exit(FAILED_CODE)
    return checkpoints.best_score


COLLECTIVES = ("gloo", "nccl", "connection closed by peer", "timed out", "processgroup")
"""What the errors of a broken or silent connection between ranks speak of."""


@contextmanager
def lost_ranks(config: TrainConfig, trainer: Trainer, run_dir: Path) -> Iterator[None]:
    """Say in one line that another rank died or hangs, and where to look.

    Raises:
        UserError: In place of the backend's error.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if trainer.world_size == 1 or not any(word in text.lower() for word in COLLECTIVES):
            raise
        records = flight_records(run_dir)
        look = f"; the last collectives of each rank are in {records}" if records.is_dir() else ""
        raise UserError(
            f"another rank died, or did not answer for strategy.timeout={config.strategy.timeout:g}"
            f" seconds: rank {trainer.global_rank} lost it in step {trainer.global_step + 1} "
            f"({text[:160]}){look}; resume=auto goes on from the last checkpoint"
        ) from error
