"""One training run from its typed config to its result: data, plan, fit, checkpoints, summary."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from lightning import Trainer

from blip3o_lit.base.files import claimed
from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.home import home
from blip3o_lit.base.launcher import launch
from blip3o_lit.budget.forecast import forecast
from blip3o_lit.budget.machine import this_machine
from blip3o_lit.budget.out_of_memory import advice, memory_limit
from blip3o_lit.budget.placement import format_word
from blip3o_lit.budget.plan import Plan, make_plan
from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.initial import initial_weights
from blip3o_lit.checkpoints.resume import (
    check_tokens,
    finished_result,
    refuse_used,
    resolve_resume,
    say_resumed,
)
from blip3o_lit.config.errors import LostRank
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.testbeds.token_source import token_stores
from blip3o_lit.tokens.datamodule import TokenDataModule, run_settings
from blip3o_lit.training import run_files
from blip3o_lit.training.cluster import first_rank, ranks
from blip3o_lit.training.environment import quiet_libraries
from blip3o_lit.training.loggers import loggers
from blip3o_lit.training.module import TranslationModule
from blip3o_lit.training.overfit import FAILED_CODE, Overfit, check_overfit
from blip3o_lit.training.own_parts import check_own_parts
from blip3o_lit.training.pace import step_seconds
from blip3o_lit.training.trainer import Callbacks, build_trainer, flight_records, machine_of
from blip3o_lit.training.trainer_arguments import check_extra, cut_by

# EX_TEMPFAIL of sysexits.h: the run was preempted and goes on when it is started again.
PREEMPTED_CODE = 75
INTERRUPTED_CODE = 130
COLLECTIVES = ("gloo", "nccl", "connection closed by peer", "timed out", "processgroup")
"""What the errors of a broken or silent connection between ranks speak of."""


def run_training(config: TrainConfig, run_dir: Path, overrides: list[str]) -> float | None:
    """Train by `config` into `run_dir`; `overrides` are the command line's, for the record.

    Returns:
        The best held-out cosine; None from `plan` and `dry_run`, and without a validation split.

    Raises:
        UserError: For anything in the configuration, data or machine that the user can mend.
        SystemExit: With 130 from a run stopped by Ctrl-C and 75 from one that was preempted, both
            after saving; with 1 where the run ended below evaluation.overfit_at_least.
    """
    quiet_libraries()
    check_extra(config.trainer.extra)
    check_own_parts(config)
    run_dir = run_dir.resolve()
    if config.plan:  # `plan=true` asks what the run would cost: no run directory, no GPU
        run_files.print_rows(forecast(config, *open_data(config)))
        return None
    with claimed(run_dir, "hydra.run.dir") if launch().first else nullcontext():
        return train_in(run_dir, config, overrides)


def train_in(run_dir: Path, config: TrainConfig, overrides: list[str]) -> float | None:
    """Train in a folder that no other process writes into; otherwise as `run_training`."""
    refuse_used(config, run_dir)
    here = this_machine(config.trainer.accelerator)
    first = first_rank(launch(), config, here.devices)
    machine = machine_of(config, here, first)
    data, steps = open_data(config, first)
    resumed = resolve_resume(config, run_dir, first)
    if resumed:  # `precision=auto` keeps to the format that the run began in
        own_format = checkpointing.about(resumed)["config"]["precision"]["name"]
        machine = replace(machine, precision=own_format)
    precision = replace(config.precision, name=format_word(config, machine))
    config = replace(config, precision=precision)
    if resumed:
        check_tokens(resumed, data.facts)
        # Ranks that the first one starts come when it has written its own files already.
        result = first.finds(partial(finished_result, config, run_dir, resumed, steps))
        if result is not None:
            if launch().first:
                run_files.say_finished(run_dir, result)
            if not result.get("overfit", {}).get("passed", True):
                sys.exit(FAILED_CODE)
            return result["best"]["cosine"]
    plan = make_plan(config, data, steps, machine)
    initial = None if resumed else initial_weights(config, data.shape)  # before a file is written
    place = plan.placement
    data.micro_batch_size = place.micro_batch
    cluster = ranks(launch(), place.devices, place.nodes)
    if launch().first:
        if resumed:
            say_resumed(config, resumed)
        if not config.dry_run:
            if config.overwrite:
                run_files.remove_run(run_dir)
            run_files.write_run_files(config, run_dir, overrides, data.facts)
        run_files.show_plan(plan, run_dir, resumed)
    if config.dry_run:
        run_files.console.print("dry run: everything was built, no step was taken")
        return None
    if initial is not None and launch().first:
        initial.say()
    module = TranslationModule(plan, data, initial)
    start = int(checkpointing.read_lazily(resumed)["global_step"]) if resumed else 0
    if place.device == "cpu" and place.world == 1:
        with memory_limit(lambda: advice(plan)):
            run_files.show_time(steps - start, step_seconds(plan, module, data.train))
    if place.compiled:
        if place.nodes == 1:
            # The next run finds the kernels there; on several nodes it may lie in a shared home,
            # and torch's own, in each machine's temporary folder, is the better one.
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(home() / "kernels"))
        module.network.compile_blocks()
        data.compile_towers()
    callbacks = Callbacks(plan, data, run_dir, resumed)
    if callbacks.mirror is not None:
        callbacks.mirror.begin(resumed is None, config.overwrite)
    run_loggers = loggers(config, run_dir, resumed, start) if launch().first else []
    trainer = build_trainer(plan, cluster, callbacks, run_loggers, run_dir)
    try:
        return fit(plan, trainer, callbacks, module, data, resumed, run_dir)
    finally:
        if callbacks.mirror is not None:
            callbacks.mirror.finish()


def open_data(config: TrainConfig, first: FirstRank = ALONE) -> tuple[TokenDataModule, int]:
    """Open the token store and return it with the number of optimizer steps."""
    if config.data.name == "images":
        data = _pictures(config, first)
    else:
        data = TokenDataModule(store=token_stores(config.data), **run_settings(config))
        data.open(first)
    return data, data.steps_for(config.trainer.max_steps, config.trainer.max_epochs)


def _pictures(config: TrainConfig, first: FirstRank) -> TokenDataModule:
    """Open the pictures of a run; for a plan without decoding any."""
    from blip3o_lit.extraction.direct.datamodule import PictureDataModule
    from blip3o_lit.extraction.direct.kept import KeptDataModule

    if config.data.keep and not config.plan:
        kept = KeptDataModule(config)
        kept.open(first)
        return kept
    pictures = PictureDataModule(config)
    pictures.open(first, statistics=not config.plan)
    return pictures


def fit(
    plan: Plan,
    trainer: Trainer,
    callbacks: Callbacks,
    module: TranslationModule,
    data: TokenDataModule,
    resumed: Path | None,
    run_dir: Path,
) -> float | None:
    """Train, then write result.json and say what comes next; a run that was stopped exits."""
    config, stop = plan.config, callbacks.stop
    started = time.perf_counter()
    out_of_memory = memory_limit(lambda: advice(plan) + snapshot(plan, run_dir))
    if plan.placement.device == "cuda" and config.trainer.memory_history:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    with stop.listening(), out_of_memory, lost_ranks(config, trainer, run_dir):
        trainer.fit(module, datamodule=data, ckpt_path=resumed, weights_only=True)
    seconds = time.perf_counter() - started

    # No signal, and steps left: a callback stopped it, or trainer.extra cut it short.
    cut = stop.received is None and bool(cut_by(config.trainer.extra))
    early = stop.received is None and trainer.global_step < plan.steps and not cut
    finished = not cut and (early or trainer.global_step >= plan.steps)
    overfit: Overfit | None = None
    if config.evaluation.overfit_at_least is not None and stop.received is None:
        module.to(trainer.strategy.root_device)
        bar = config.evaluation.overfit_at_least
        overfit = check_overfit(config, module.translator, data, bar)

    if trainer.is_global_zero:
        result = run_files.write_result(
            trainer.global_step, callbacks, run_dir, seconds, finished, config, overfit
        )
        if cut:
            run_files.say_cut(plan, trainer.global_step)
        elif not finished:
            run_files.say_how_to_resume(run_dir, trainer.global_step)
        else:
            if early:
                run_files.say_stopped_early(plan, trainer.global_step)
            run_files.closing_table(run_dir, result)
            if overfit is not None:
                run_files.say(str(overfit))
    if not finished and not cut:
        sys.exit(INTERRUPTED_CODE if stop.received == signal.SIGINT else PREEMPTED_CODE)
    if overfit is not None and not overfit.passed:
        sys.exit(FAILED_CODE)
    return callbacks.checkpoints.best_score


def snapshot(plan: Plan, run_dir: Path) -> str:
    """Write what holds the memory of a CUDA device, and return where, as the end of a line."""
    if plan.placement.device != "cuda":
        return ""
    file = run_dir / "profile" / f"out-of-memory-{launch().rank or launch().local}.pickle"
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(file))
    return f"; {file} shows what held it, at https://docs.pytorch.org/memory_viz"


@contextmanager
def lost_ranks(config: TrainConfig, trainer: Trainer, run_dir: Path) -> Iterator[None]:
    """Say in one line that another rank died or hangs, and where to look."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if trainer.world_size == 1 or not any(word in text.lower() for word in COLLECTIVES):
            raise
        records = flight_records(run_dir)
        found = records.is_dir() and any(file.stat().st_size for file in records.iterdir())
        look = f"; stacks and, on GPUs, the last collectives are in {records}" if found else ""
        raise LostRank(
            f"another rank died, or did not answer for strategy.timeout={config.strategy.timeout:g}"
            f" seconds: rank {trainer.global_rank} lost it in step {trainer.global_step + 1} "
            f"({text[:160]}){look}; resume=auto goes on from the last checkpoint"
        ) from error
