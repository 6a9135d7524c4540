"""A run's layout, decided once: devices, processes, strategy, number format, micro-batch.

`resolve` is a pure function of the configuration, the shapes and the machine, so a forecast for a
machine that is not there and a run on one that is share one path.
"""

from dataclasses import dataclass

from blip3o_lit.base.shape import PairShape
from blip3o_lit.budget.activations import Activations, activations
from blip3o_lit.budget.machine import Machine
from blip3o_lit.budget.states import rank_bytes, units
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.models.precision import AUTO, PRECISIONS, Precision
from blip3o_lit.tokens.reading.batches import batch_plan

USABLE = {"cpu": 0.4, "cuda": 0.8, "mps": 0.5}
"""Share of a device's memory that states and activations may take; the rest is for batches,
buckets, kernels' workspaces and, on a CPU, for everything else that runs there."""


@dataclass(frozen=True)
class Placement:
    """Where and how the work of one optimizer step is done."""

    device: str
    """cpu, cuda or mps."""
    devices: int
    """Processes of a node, one per device."""
    nodes: int
    strategy: str
    """single, ddp or fsdp2."""
    precision: Precision
    micro_batch: int
    """Images of one forward pass of one process."""
    accumulation: int
    """Forward passes of a process per optimizer step."""
    compiled: bool
    """Whether the blocks run through torch.compile."""

    @property
    def world(self) -> int:
        """Processes of the run."""
        return self.devices * self.nodes


def resolve(config: TrainConfig, shape: PairShape, machine: Machine) -> Placement:
    """Decide the layout of a run."""
    precision = _precision(config, machine)
    devices, nodes = _processes(config, machine)
    world = devices * nodes
    strategy = _strategy(config, machine, world)
    # Refuses batches that don't divide before anything is measured.
    micro_batch = batch_plan(config.batch_size, config.micro_batch_size, world).micro_batch_size
    compiled = _compiled(config, machine)
    if config.micro_batch_size is None:
        room = machine.memory_of_process(devices) * USABLE[machine.device]
        kept = activations(config.model, config.flow, shape, precision, machine.device, compiled)
        micro_batch = _fitting_micro_batch(config, shape, kept, precision, strategy, world, room)
    return Placement(
        device=machine.device,
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        precision=precision,
        micro_batch=micro_batch,
        accumulation=config.batch_size // (world * micro_batch),
        compiled=compiled,
    )


def format_word(config: TrainConfig, machine: Machine) -> str:
    """Return the word of the number format, which `precision=auto` leaves to the machine."""
    word = config.precision.name
    return machine.precision if word == AUTO else word


def _precision(config: TrainConfig, machine: Machine) -> Precision:
    precision = PRECISIONS[format_word(config, machine)]
    word = f"precision={precision.name}"
    if precision.cuda_only and machine.device != "cuda":
        raise UserError(f"{word} needs a CUDA GPU, this run is on {machine.device}: use bf16")
    if precision.matmul == "high" and not machine.tf32:
        raise UserError(f"{word}: this GPU has no TF32: use precision=fp16 or fp32")
    if precision.low and not precision.loss_scale and not machine.bf16:
        raise UserError(f"{word}: this GPU has no bf16: use precision=fp16")
    if config.precision.float8 and not machine.float8:
        raise UserError("precision.float8=true: this device has no such products: leave it out")
    return precision


def _processes(config: TrainConfig, machine: Machine) -> tuple[int, int]:
    """Return processes per node, and nodes."""
    wanted, nodes = config.trainer.devices, config.trainer.num_nodes
    if machine.processes is not None:  # a launcher has started them already
        there = machine.nodes or 1
        if not machine.imagined:
            if wanted not in ("auto", str(machine.processes)):
                raise UserError(
                    f"trainer.devices={wanted}: {machine.launcher} started {machine.processes} "
                    "processes on this node: leave the override out"
                )
            if nodes not in (1, there):
                raise UserError(
                    f"trainer.num_nodes={nodes}: {machine.launcher} started processes on {there} "
                    "nodes: leave the override out"
                )
        return machine.processes, there
    if wanted == "auto":
        return (1 if config.strategy.name == "single" else machine.devices), nodes
    devices = int(wanted)
    if machine.device == "cuda" and devices > machine.devices:
        raise UserError(f"trainer.devices={devices}: this machine has {machine.devices} GPUs")
    if machine.device == "mps" and devices > 1:
        raise UserError(f"trainer.devices={devices}: Apple GPUs train in one process")
    return devices, nodes


def _strategy(config: TrainConfig, machine: Machine, world: int) -> str:
    name = config.strategy.name
    replicas = config.strategy.replicas
    if replicas > 1 and (name != "fsdp2" or world % replicas):
        raise UserError(
            f"strategy.replicas={replicas} with strategy={name} and {world} processes: it takes "
            "strategy=fsdp2 and a number of processes that it divides"
        )
    if name == "auto":
        return "ddp" if world > 1 else "single"
    if name == "single" and world > 1:
        raise UserError(
            f"strategy=single with {world} processes: use strategy=ddp or fsdp2, or one device"
        )
    if name == "fsdp2" and machine.device == "mps":
        raise UserError("strategy=fsdp2 needs CUDA GPUs or a CPU: use strategy=single")
    return name


def _compiled(config: TrainConfig, machine: Machine) -> bool:
    word = config.model.compile
    if word == "combined" and machine.device != "cuda":
        raise UserError(f"model.compile=combined needs a CUDA GPU, this run is on {machine.device}")
    return machine.compiles if word == "auto" else word != "false"


def _fitting_micro_batch(
    config: TrainConfig,
    shape: PairShape,
    kept: Activations,
    precision: Precision,
    strategy: str,
    world: int,
    room: float,
) -> int:
    """Return the largest divisor of a process's images that fits into `room` bytes; at least 1."""
    counts = units(config.model, shape)
    per_process, shards = config.batch_size // world, world // config.strategy.replicas
    for micro_batch in range(per_process, 1, -1):
        if per_process % micro_batch:
            continue
        accumulated = micro_batch < per_process
        states = rank_bytes(strategy, counts, precision, config.optimizer, shards, accumulated)
        if states + kept.of(micro_batch, strategy) <= room:
            return micro_batch
    return 1
