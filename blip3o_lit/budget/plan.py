"""What a run takes, worked out before it starts: every derived value, printed once."""

from dataclasses import dataclass, replace
from pathlib import Path

from blip3o_lit.base.shape import PairShape
from blip3o_lit.base.units import gib, human_count
from blip3o_lit.budget.activations import Activations, activations
from blip3o_lit.budget.machine import Machine
from blip3o_lit.budget.placement import Placement, resolve
from blip3o_lit.budget.states import Units, rank_bytes, units
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.tokens.datamodule import TokenDataModule

SNAPSHOT_BYTES = 2
"""Of a parameter of a stored average, which is fp16."""


@dataclass(frozen=True)
class Plan:
    """A run's configuration and layout, and the figures that follow from them."""

    config: TrainConfig
    placement: Placement
    device_name: str
    shape: PairShape
    store: Path | str
    steps: int
    train_images: int
    validation_images: int

    @property
    def units(self) -> Units:
        return units(self.config.model, self.shape)

    @property
    def activations(self) -> Activations:
        config, place = self.config, self.placement
        return activations(
            config.model, config.flow, self.shape, place.precision, place.device, place.compiled
        )

    def state_bytes(self, strategy: str | None = None) -> int:
        """Return weights, gradients, optimizer and average on one process, in bytes."""
        place = self.placement
        return rank_bytes(
            strategy or place.strategy,
            self.units,
            place.precision,
            self.config.optimizer,
            place.world // self.config.strategy.replicas,
            place.accumulation > 1,
        )

    def activation_bytes(self, strategy: str | None = None) -> int:
        """Return what a micro-batch holds on one process, in bytes."""
        place = self.placement
        return self.activations.of(place.micro_batch, strategy or place.strategy)

    @property
    def step_flops(self) -> float:
        """Matrix arithmetic that one optimizer step asks for: three times the forward pass.

        The target of a pair takes two more.
        """
        passes = 3 + 2 * self.config.flow.pairs
        return passes * self.units.forward_flops * self.config.batch_size

    def rows(self) -> list[tuple[str, str]]:
        target = self.shape.target
        place, batch, steps = self.placement, self.config.batch_size, self.steps
        return [
            (
                "device",
                f"{self.device_name}, {place.precision.name}, {place.strategy} x{place.world}"
                f"{', compiled' if place.compiled else ''}",
            ),
            ("tokens", f"{self.store} ({self.config.mode.name})"),
            ("images", f"{self.train_images} training, {self.validation_images} validation"),
            (
                "task",
                f"{self.shape.condition_text} -> {target.tokens} x {target.width}",
            ),
            ("parameters", human_count(self.units.total)),
            (
                "batch",
                f"{batch} = {place.world} process(es) x {place.micro_batch} x "
                f"{place.accumulation} accumulated",
            ),
            *self._auto_rate(),
            ("steps", f"{steps} ({steps * batch / self.train_images:.1f} epochs)"),
            (
                "arithmetic",
                f"{human_count(self.step_flops)}FLOP a step, "
                f"{human_count(self.step_flops * steps)}FLOP in all",
            ),
            (
                "memory",
                f"{gib(self.state_bytes())} weights, gradients, optimizer and EMA; "
                f"about {gib(self.activation_bytes())} activations a process",
            ),
            *self._averages(),
        ]

    def _auto_rate(self) -> list[tuple[str, str]]:
        """Return what optimizer.lr=auto came to."""
        optimizer = self.config.optimizer
        if optimizer.auto_lr is None:
            return []
        what = f"{optimizer.name}, {self.config.model.width} wide"
        return [("learning rate", f"{optimizer.peak:g} (optimizer.lr=auto: {what})")]

    def _averages(self) -> list[tuple[str, str]]:
        """Return what the profiles take on the disk, beside what each checkpoint has of them."""
        widths, count = self.config.optimizer.ema_profiles, self.config.optimizer.ema_snapshots
        if not widths:
            return []
        one = SNAPSHOT_BYTES * self.units.total * len(widths)
        names = ", ".join(f"{width:g}" for width in widths)
        return [
            (
                "averages",
                f"widths {names}: stored up to {min(count, self.steps)} times, {gib(one)} each, "
                f"{gib(min(count, self.steps) * one)} of disk in all",
            )
        ]


def _beside_towers(machine: Machine, tower_bytes: int) -> Machine:
    """Return a machine without the memory that each device's towers take."""
    return replace(machine, memory=max(1, machine.memory - tower_bytes)) if tower_bytes else machine


def make_plan(config: TrainConfig, data: TokenDataModule, steps: int, machine: Machine) -> Plan:
    """Lay a run out on a machine; `data` is open."""
    return Plan(
        config=config,
        placement=resolve(config, data.shape, _beside_towers(machine, data.tower_bytes)),
        device_name=machine.name,
        shape=data.shape,
        store=data.store_path,
        steps=steps,
        train_images=len(data.train),
        validation_images=len(data.validation) if data.validation else 0,
    )
