"""What a run takes, worked out before it starts: every derived value, printed once.

A run prints `Plan.rows` of the machine it is on; `plan=true` prints the same rows, and those of
`forecast`, of a machine that is imagined.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from blip3o_lit.base.shape import PairShape
from blip3o_lit.base.units import gib, human_count
from blip3o_lit.budget.activations import Activations, activations
from blip3o_lit.budget.machine import Machine
from blip3o_lit.budget.placement import Placement
from blip3o_lit.budget.states import Units, rank_bytes, units
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.models.network_of import build_network
from blip3o_lit.tokens.datamodule import TokenDataModule


@dataclass(frozen=True)
class Plan:
    """The figures of a run."""

    placement: Placement
    device: str
    """The device's name."""
    units: Units
    """Parameters of the network."""
    forward_flops: int
    """Of one image."""
    recomputed: bool
    """Whether blocks are computed twice."""
    batch: int
    steps: int
    train_images: int
    validation_images: int
    tokens: str
    """The store and its view."""
    run_dir: Path | None
    shape: PairShape
    state_bytes: int
    """Weights, gradients, optimizer and average on one process."""
    activations: Activations

    @property
    def activation_bytes(self) -> int:
        """Of one micro-batch. FSDP2 gathers weights in use, so autocast copies none of them."""
        micro = self.placement.micro_batch
        if self.placement.strategy == "fsdp2":
            return micro * self.activations.image
        return self.activations.of(micro)

    @property
    def step_flops(self) -> float:
        """Matrix arithmetic that one optimizer step asks for: three times the forward pass."""
        return 3.0 * self.forward_flops * self.batch

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as labelled lines."""
        condition, target = self.shape.condition, self.shape.target
        place = self.placement
        epochs = self.steps * self.batch / self.train_images
        rows = [
            ("device", f"{self.device}, {place.precision.name}, {place.strategy} x{place.world}"),
            ("tokens", self.tokens),
            ("images", f"{self.train_images} training, {self.validation_images} validation"),
            (
                "task",
                f"{condition.tokens} x {condition.width} -> {target.tokens} x {target.width}",
            ),
            ("parameters", human_count(self.units.total)),
            (
                "batch",
                f"{self.batch} = {place.world} process(es) x {place.micro_batch} x "
                f"{place.accumulation} accumulated",
            ),
            ("steps", f"{self.steps} ({epochs:.1f} epochs)"),
            (
                "arithmetic",
                f"{human_count(self.step_flops)}FLOP a step, "
                f"{human_count(self.step_flops * self.steps)}FLOP in all",
            ),
            (
                "memory",
                f"{gib(self.state_bytes)} weights, gradients, optimizer and EMA; "
                f"about {gib(self.activation_bytes)} activations a process",
            ),
        ]
        return rows + ([("run directory", str(self.run_dir))] if self.run_dir else [])


def make_plan(
    config: TrainConfig,
    data: TokenDataModule,
    steps: int,
    placement: Placement,
    machine: Machine,
    run_dir: Path | None = None,
) -> Plan:
    """Work out the figures of a run.

    Args:
        config: The run's configuration.
        data: Its data, open.
        steps: Optimizer steps.
        placement: Its layout.
        machine: The machine of that layout.
        run_dir: Where it writes; None for a forecast.
    """
    parts = units(config.model, data.shape)
    return Plan(
        placement=placement,
        device=machine.name,
        units=parts,
        forward_flops=forward_flops(config.model, data.shape),
        recomputed=config.model.activation_checkpointing,
        batch=config.batch_size,
        steps=steps,
        train_images=len(data.train),
        validation_images=len(data.validation) if data.validation else 0,
        tokens=f"{data.store_path} ({config.mode.name})",
        run_dir=run_dir,
        shape=data.shape,
        state_bytes=rank_bytes(
            placement.strategy,
            parts,
            placement.precision,
            config.optimizer.name,
            placement.world,
            placement.accumulation > 1,
        ),
        activations=activations(config.model, config.flow, data.shape, placement.precision),
    )


def forward_flops(model: ModelConfig, shape: PairShape) -> int:
    """Return the forward FLOPs per image, without allocating the network."""
    with torch.device("meta"):
        return build_network(model, shape).forward_flops()
