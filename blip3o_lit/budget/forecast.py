"""What a run would cost on a number of GPUs, worked out without touching one (`plan=true`)."""

from blip3o_lit.base.units import gib, human_count, human_time
from blip3o_lit.budget.machine import GPUS, imagined_machine
from blip3o_lit.budget.pictures import picture_rows
from blip3o_lit.budget.plan import Plan, make_plan
from blip3o_lit.budget.states import States, gathered_bytes, states
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.extraction.direct.datamodule import PictureDataModule
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.reader import TokenReader

WRITE_RATE = 1e9
"""Bytes per second at which one process is taken to write."""


def forecast(config: TrainConfig, data: TokenDataModule, steps: int) -> list[tuple[str, str]]:
    """Return the figures of a run on `config.world` GPUs as labelled lines."""
    devices = int(config.trainer.devices) if config.trainer.devices.isdigit() else 1
    machine = imagined_machine(config.gpu, config.world or devices * config.trainer.num_nodes)
    plan = make_plan(config, data, steps, machine)
    whole = states(plan.units, plan.placement.precision, config.optimizer)
    rows = plan.rows() + _memory(plan, whole)
    if isinstance(data, PictureDataModule):
        rows += picture_rows(plan, data)
        return rows + _time(plan, whole.saved, None, data.tower_flops)
    rows += _words(data.train)
    return rows + _time(plan, whole.saved, data.train.sample_bytes)


def _words(train: TokenReader) -> list[tuple[str, str]]:
    """Return how long captions are and what reading one takes, on average and at most."""
    if not train.words or train.shape.words is None:
        return []
    longest, mean = train.shape.words.longest, train.mean_length
    row = train.index.arrays[train.words].row_bytes
    return [
        (
            "words",
            f"{mean:.1f} tokens a caption on average, {longest} at most: "
            f"{mean * row / 1e3:.1f} kB and {longest * row / 1e3:.1f} kB",
        )
    ]


def _memory(plan: Plan, whole: States) -> list[tuple[str, str]]:
    rows = [
        (
            "bytes of states",
            f"weights {gib(whole.weights)}, gradients {gib(whole.gradients)}, "
            f"optimizer {gib(whole.optimizer)}, EMA {gib(whole.average)}",
        )
    ]
    memory = GPUS[plan.config.gpu].memory
    for strategy in ("ddp", "fsdp2") if plan.placement.world > 1 else ("single",):
        own, saved = plan.state_bytes(strategy), plan.activation_bytes(strategy)
        gathered = ""
        if strategy == "fsdp2":
            gathered = f" ({gib(gathered_bytes(plan.units, plan.placement.precision))} gathered)"
        fits = "" if own + saved <= memory else ": does not fit"
        rows.append(
            (
                f"a rank, {strategy}",
                f"{gib(own)} states{gathered} + {gib(saved)} activations = "
                f"{gib(own + saved)} of {gib(memory)}{fits}",
            )
        )
    return rows


def _time(
    plan: Plan, checkpoint_bytes: int, image_bytes: int | None, tower_flops: float = 0.0
) -> list[tuple[str, str]]:
    """Return what the data path must deliver, what checkpoints take, and hours.

    `tower_flops` come to each image of a run that encodes pictures itself.
    """
    config, world = plan.config, plan.placement.world
    gpu = GPUS[config.gpu]
    peak = gpu.low if plan.placement.precision.low else gpu.full
    recomputed = 1 + (1 - config.model.kept_activations) / 3  # of the products
    flops = recomputed * plan.step_flops + tower_flops * config.batch_size
    seconds = flops / (world * peak * config.mfu)
    images, total = config.batch_size / seconds, plan.steps * seconds
    delivered = ""
    if image_bytes is not None:
        rate = images * image_bytes / 1e9
        delivered = f", {rate:.2f} GB/s in all, {rate / world:.3f} a rank"
    return [
        ("speed", f"{config.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s on {world} x {config.gpu}"),
        (
            "data",
            f"{human_count(images * plan.shape.target.tokens)} target tokens/s, "
            f"{images:.0f} images/s" + delivered,
        ),
        (
            "checkpoint",
            f"{gib(checkpoint_bytes)}: {human_time(checkpoint_bytes / WRITE_RATE)} in one file, "
            f"{human_time(checkpoint_bytes / world / WRITE_RATE)} in shards, at 1 GB/s a writer",
        ),
        (
            "time",
            f"{human_time(seconds)} a step, {human_time(total)} "
            f"({total / 3600:.2f} h, {world * total / 3600:.1f} GPU hours)",
        ),
    ]
