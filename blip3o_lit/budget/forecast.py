"""What a run would cost on a number of GPUs, worked out without touching one (`plan=true`)."""

from __future__ import annotations

from blip3o_lit.base.units import gib, human_count, human_time
from blip3o_lit.budget.machine import GPUS, imagined
from blip3o_lit.budget.placement import resolve
from blip3o_lit.budget.plan import Plan, make_plan
from blip3o_lit.budget.states import gathered_bytes, rank_bytes, states
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.stream import StreamReader

WRITE_RATE = 1e9
"""Bytes per second at which one process is taken to write."""


def forecast(config: TrainConfig, data: TokenDataModule, steps: int) -> list[tuple[str, str]]:
    """Return the figures of a run on `world` GPUs as labelled lines.

    Raises:
        UserError: For an unknown GPU, or a layout that is ruled out.
    """
    devices = int(config.trainer.devices) if config.trainer.devices.isdigit() else 1
    machine = imagined(config.gpu, config.world or devices * config.trainer.num_nodes)
    placement = resolve(config, data.shape, machine)
    plan = make_plan(config, data, steps, placement, machine)
    return plan.rows() + _memory(plan, config) + _time(plan, config, stored_bytes(data))


def _memory(plan: Plan, config: TrainConfig) -> list[tuple[str, str]]:
    """Return the bytes of the states, and of a process under each strategy."""
    place, optimizer = plan.placement, config.optimizer.name
    whole = states(plan.units, place.precision, optimizer)
    rows = [
        (
            "bytes of states",
            f"weights {gib(whole.weights)}, gradients {gib(whole.gradients)}, "
            f"optimizer {gib(whole.optimizer)}, EMA {gib(whole.average)}",
        )
    ]
    memory = GPUS[config.gpu].memory
    accumulated = place.accumulation > 1
    for strategy in ("ddp", "fsdp2") if place.world > 1 else ("single",):
        own = rank_bytes(strategy, plan.units, place.precision, optimizer, place.world, accumulated)
        gathered, kept = "", plan.activations.of(place.micro_batch)
        if strategy == "fsdp2":
            gathered = f" ({gib(gathered_bytes(plan.units, place.precision))} gathered)"
            kept = place.micro_batch * plan.activations.image
        fits = "" if own + kept <= memory else ": does not fit"
        rows.append(
            (
                f"a rank, {strategy}",
                f"{gib(own)} states{gathered} + {gib(kept)} activations = "
                f"{gib(own + kept)} of {gib(memory)}{fits}",
            )
        )
    return rows


def _time(plan: Plan, config: TrainConfig, image_bytes: int) -> list[tuple[str, str]]:
    """Return what the data path must deliver, what checkpoints take, and hours."""
    place, world = plan.placement, plan.placement.world
    gpu = GPUS[config.gpu]
    peak = gpu.low if place.precision.low else gpu.full
    computed = plan.step_flops * (4 / 3 if plan.recomputed else 1)
    seconds = computed / (world * peak * config.mfu)
    images = plan.batch / seconds
    saved = states(plan.units, place.precision, config.optimizer.name).saved
    total = plan.steps * seconds
    return [
        ("speed", f"{config.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s on {world} x {config.gpu}"),
        (
            "data",
            f"{human_count(images * plan.shape.target.tokens)} target tokens/s, "
            f"{images:.0f} images/s, {images * image_bytes / 1e9:.2f} GB/s in all, "
            f"{images * image_bytes / 1e9 / world:.3f} a rank",
        ),
        (
            "checkpoint",
            f"{gib(saved)}: {human_time(saved / WRITE_RATE)} in one file, "
            f"{human_time(saved / world / WRITE_RATE)} in shards, at 1 GB/s a writer",
        ),
        (
            "time",
            f"{human_time(seconds)} a step, {human_time(total)} "
            f"({total / 3600:.2f} h, {world * total / 3600:.1f} GPU hours)",
        ),
    ]


def stored_bytes(data: TokenDataModule) -> int:
    """Return the bytes that the store holds of one pair of tokens."""
    if isinstance(data.train, StreamReader):
        return data.train.sample_bytes
    arrays = data.train.store.index.arrays
    return sum(arrays[name].nbytes for name in (data.train.condition, data.train.target))
