"""What a run would cost on a number of GPUs, worked out without touching one (`plan=true`)."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.callbacks.run_log import human_count, human_time
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.footprint import Units, activations, units
from blip3o_lit.plan import GPU_MEMORY, GPU_PEAKS, count_parameters
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.stream import StreamReader
from blip3o_lit.tokens.world import batch_plan

WRITE_RATE = 1e9
"""Bytes a second at which one process is taken to write."""
ACTIVATION_SHARE = 0.5
"""Of a GPU's memory, for the largest micro-batch that is chosen by itself."""


@dataclass(frozen=True)
class States:
    """Bytes of what lasts from step to step."""

    weights: int
    gradients: int
    optimizer: int
    average: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer + self.average

    @property
    def saved(self) -> int:
        """Those that a checkpoint holds."""
        return self.total - self.gradients


def states(parts: Units, precision: str, optimizer: str) -> States:
    """Return the bytes of a whole network's states.

    AdamW's two moments, and Muon's one, have the weights' format; the average is fp32.
    """
    size = 2 if precision == "bf16_true" else 4
    moments = 2 * parts.total - (parts.hidden if optimizer == "muon" else 0)
    return States(size * parts.total, size * parts.total, size * moments, 4 * parts.total)


def gathered_bytes(parts: Units, precision: str) -> int:
    """Return what FSDP2 holds beside its shards: weights in use, those on their way, gradients.

    The rest of the network stays gathered, with one part in use and the next one coming; the
    gradient of one part waits whole to be summed in fp32.
    """
    size = 4 if precision in ("fp32", "tf32") else 2
    return size * (parts.rest + 2 * parts.largest) + (size + 4) * parts.largest


def rank_bytes(
    strategy: str,
    parts: Units,
    precision: str,
    optimizer: str,
    world: int,
    accumulated: bool = False,
) -> int:
    """Return the bytes of weights, gradients, optimizer and average on one process.

    Args:
        strategy: single, ddp or fsdp2.
        parts: The network's parameters.
        precision: A name of the precision group.
        optimizer: A name of the optimizer group.
        world: Processes.
        accumulated: Whether a step has several micro-batches: DDP then sums gradients beside the
            buckets that it sends.
    """
    kept = states(parts, precision, optimizer)
    held = kept.total
    if strategy == "ddp" and accumulated:
        held += kept.gradients
    if strategy != "fsdp2":
        return held
    return held // world + gathered_bytes(parts, precision)


def chosen_micro_batch(config: TrainConfig, world: int, image: int) -> int:
    """Return the images of a forward pass: as asked for, or what fits the GPU.

    Raises:
        UserError: If the batch does not divide over processes and micro-batches.
    """
    share = batch_plan(config.batch_size, config.micro_batch_size, world).micro_batch_size
    if config.micro_batch_size is not None:
        return share
    limit = ACTIVATION_SHARE * GPU_MEMORY[config.gpu] * 1e9 / image
    return max((n for n in range(1, share + 1) if share % n == 0 and n <= limit), default=1)


def forecast(config: TrainConfig, data: TokenDataModule, steps: int) -> list[tuple[str, str]]:
    """Return the figures of a run on `world` GPUs as labelled lines.

    Raises:
        UserError: For an unknown GPU, or a batch that does not divide.
    """
    if config.gpu not in GPU_PEAKS:
        raise UserError(f"gpu={config.gpu} is unknown: choose from {', '.join(GPU_PEAKS)}")
    shape, name = data.shape, config.precision.name
    devices = int(config.trainer.devices) if config.trainer.devices.isdigit() else 1
    world = config.world or devices * config.trainer.num_nodes
    parts = units(config.model, shape)
    needed = activations(config.model, config.flow, shape, name, accelerator=True)
    micro = chosen_micro_batch(config, world, needed.image)
    accumulation = config.batch_size // (world * micro)
    _, flops = count_parameters(config.model, shape)
    step_flops = 3.0 * flops * config.batch_size
    if config.model.activation_checkpointing:
        step_flops *= 4 / 3
    peak = GPU_PEAKS[config.gpu][int(name in ("fp32", "tf32"))]
    seconds = step_flops / (world * peak * config.mfu)
    optimizer = config.optimizer.name
    kept = states(parts, name, optimizer)
    checkpoint = kept.saved
    images = config.batch_size / seconds
    rows = [
        (
            "device",
            f"{world} x {config.gpu}, {name}, {config.mfu:.0%} of {peak / 1e12:.0f} TFLOP/s",
        ),
        ("parameters", human_count(parts.total)),
        (
            "batch",
            f"{config.batch_size} = {world} x {micro} x {accumulation} accumulated",
        ),
        (
            "bytes of states",
            f"weights {gib(kept.weights)}, gradients {gib(kept.gradients)}, "
            f"optimizer {gib(kept.optimizer)}, EMA {gib(kept.average)}",
        ),
    ]
    for strategy in ("ddp", "fsdp2") if world > 1 else ("single",):
        own = rank_bytes(strategy, parts, name, optimizer, world, accumulation > 1)
        gathered = f" ({gib(gathered_bytes(parts, name))} gathered)" if strategy == "fsdp2" else ""
        # FSDP2 gathers weights in the format they are used in, so autocast copies none.
        acts = needed.of(micro) if strategy != "fsdp2" else micro * needed.image
        fits = "" if own + acts <= GPU_MEMORY[config.gpu] * 1e9 else ": does not fit"
        rows.append(
            (
                f"a rank, {strategy}",
                f"{gib(own)} states{gathered} + {gib(acts)} activations = "
                f"{gib(own + acts)} of {gib(GPU_MEMORY[config.gpu] * 1e9)}{fits}",
            )
        )
    share = checkpoint / world
    image_bytes = stored_bytes(data)
    return [
        *rows,
        (
            "arithmetic",
            f"{human_count(step_flops)}FLOP a step, {human_count(step_flops * steps)}FLOP in all",
        ),
        (
            "data",
            f"{human_count(images * shape.target.tokens)} target tokens/s, {images:.0f} images/s, "
            f"{images * image_bytes / 1e9:.2f} GB/s in all, "
            f"{images * image_bytes / 1e9 / world:.3f} a rank",
        ),
        (
            "checkpoint",
            f"{gib(checkpoint)}: {human_time(checkpoint / WRITE_RATE)} in one file, "
            f"{human_time(share / WRITE_RATE)} in shards, at 1 GB/s a writer",
        ),
        ("steps", f"{steps} ({steps * config.batch_size / len(data.train):.1f} epochs)"),
        (
            "time",
            f"{human_time(seconds)} a step, {human_time(seconds * steps)} "
            f"({steps * seconds / 3600:.2f} h, {world * steps * seconds / 3600:.1f} GPU hours)",
        ),
    ]


def stored_bytes(data: TokenDataModule) -> int:
    """Return the bytes that the store holds of one pair of tokens."""
    if isinstance(data.train, StreamReader):
        return data.train.sample_bytes
    arrays = data.train.store.index.arrays
    return sum(arrays[name].nbytes for name in (data.train.condition, data.train.target))


def gib(size: float) -> str:
    """Return bytes with a binary unit."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
