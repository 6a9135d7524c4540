"""What a run will cost, worked out before it starts: every derived value, printed once."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from blip3o_lit.callbacks.run_log import human_count
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.shape import PairShape
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.launcher import launch
from blip3o_lit.models.build import build_network

# Dense peaks of matrix products in FLOP/s (bf16/fp16, fp32 or TF32), from the data sheets.
GPU_PEAKS = {
    "H200": (989e12, 494e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165e12, 82e12),
    "V100": (125e12, 15.7e12),
}
# Their memory in GB.
GPU_MEMORY = {"H200": 141, "H100": 80, "A100": 80, "L40S": 48, "RTX 4090": 24, "V100": 32}
# Saved activations, in bytes per token, block and channel: measured 155 in fp32, 122 in bf16.
ACTIVATION_BYTES = {4: 155, 2: 125}
# Share of a device's memory that one micro-batch's activations may take.
ACTIVATION_SHARE = {"cpu": 0.2, "cuda": 0.5, "mps": 0.3}
LIGHTNING_PRECISION = {
    "fp32": "32-true",
    "tf32": "32-true",
    "bf16": "bf16-mixed",
    # The module itself makes its network bf16; Lightning would the average and the scales too.
    "bf16_true": "32-true",
    "fp16": "16-mixed",
}


def set_precision(name: str, device: str) -> str:
    """Set torch's matrix precision for a run and return Lightning's word for the format.

    Args:
        name: A name of the precision group.
        device: cpu, cuda or mps.

    Raises:
        UserError: If the device lacks the format.
    """
    if name in ("fp16", "tf32") and device != "cuda":
        raise UserError(f"precision={name} needs a CUDA GPU, this run is on {device}: use bf16")
    if name == "tf32" and torch.cuda.get_device_capability() < (8, 0):
        raise UserError("precision=tf32: this GPU has no TF32: use precision=fp16 or fp32")
    if name.startswith("bf16") and device == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise UserError(f"precision={name}: this GPU has no bf16: use precision=fp16")
    # On a CPU "medium" may compute fp32 products in bf16 (measured relative error 2e-3 with AMX).
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return LIGHTNING_PRECISION[name]


def inference_autocast(name: str, device: torch.device | str) -> torch.dtype | None:
    """Return the format of matrix products at inference: the run's own where the device has it."""
    if name == "fp16" and torch.device(device).type == "cuda":
        return torch.float16
    return None if name in ("fp32", "tf32") else torch.bfloat16


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the peak of matrix arithmetic: from data sheets for known GPUs, else measured.

    Args:
        device: The device.
        precision: A name of the precision group.

    Returns:
        FLOP/s of one device; the measurement takes about 0.2 s.
    """
    low = precision not in ("fp32", "tf32")
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, peaks in GPU_PEAKS.items():
            if known in name:
                return peaks[0] if low else peaks[1]
    dtype = torch.bfloat16 if low else torch.float32
    a, b = (torch.randn(2048, 1024, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b.T)
        if device.type != "cpu":
            torch.tensor(0.0, device=device).item()
        best = min(best, time.perf_counter() - started)
    return 2 * 2048 * 2048 * 1024 / best


def device_memory(device: torch.device) -> int:
    """Return the bytes of memory that the device has in all."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def activation_bytes(model: ModelConfig, tokens: int, width_bytes: int) -> int:
    """Estimate the activations that one image keeps for the backward pass."""
    depth = 1 if model.activation_checkpointing else model.depth
    per_block = tokens * model.width * ACTIVATION_BYTES[width_bytes]
    inputs = tokens * model.width * model.depth * width_bytes * int(model.activation_checkpointing)
    return depth * per_block + inputs


def fitting_micro_batch(config: TrainConfig, shape: PairShape, device: torch.device) -> int:
    """Return the largest micro-batch that divides a process's share and fits the device."""
    world = launch().world or 1
    if config.trainer.devices.isdigit():
        world = max(world, int(config.trainer.devices) * config.trainer.num_nodes)
    share = max(1, config.batch_size // world)
    low = 4 if config.precision.name in ("fp32", "tf32") else 2
    image = activation_bytes(config.model, shape.target.tokens, low)
    limit = device_memory(device) * ACTIVATION_SHARE.get(device.type, 0.5) / image
    return max((n for n in range(1, share + 1) if share % n == 0 and n <= limit), default=1)


@dataclass(frozen=True)
class Plan:
    """The figures of a run."""

    device: str
    precision: str
    strategy: str
    world: int
    parameters: int
    forward_flops: int
    """Of one image."""
    batch: int
    micro_batch: int
    accumulation: int
    steps: int
    train_images: int
    validation_images: int
    tokens: str
    run_dir: Path
    shape: PairShape
    state_gib: float
    activation_gib: float

    @property
    def step_flops(self) -> float:
        """Matrix arithmetic of one optimizer step: three times the forward pass."""
        return 3.0 * self.forward_flops * self.batch

    def rows(self) -> list[tuple[str, str]]:
        """Return the plan as labelled lines."""
        condition, target = self.shape.condition, self.shape.target
        epochs = self.steps * self.batch / self.train_images
        return [
            ("device", f"{self.device}, {self.precision}, {self.strategy} x{self.world}"),
            ("tokens", self.tokens),
            ("images", f"{self.train_images} training, {self.validation_images} validation"),
            (
                "task",
                f"{condition.tokens} x {condition.width} -> {target.tokens} x {target.width}",
            ),
            ("parameters", human_count(self.parameters)),
            (
                "batch",
                f"{self.batch} = {self.world} process(es) x {self.micro_batch} x "
                f"{self.accumulation} accumulated",
            ),
            ("steps", f"{self.steps} ({epochs:.1f} epochs)"),
            (
                "arithmetic",
                f"{human_count(self.step_flops)}FLOP a step, "
                f"{human_count(self.step_flops * self.steps)}FLOP in all",
            ),
            (
                "memory",
                f"{self.state_gib:.1f} GiB weights, gradients, optimizer and EMA; "
                f"about {self.activation_gib:.1f} GiB activations a process",
            ),
            ("run directory", str(self.run_dir)),
        ]


def count_parameters(model: ModelConfig, shape: PairShape) -> tuple[int, int]:
    """Return parameters and forward FLOPs an image, without allocating the network."""
    with torch.device("meta"):
        network = build_network(model, shape)
    return sum(p.numel() for p in network.parameters()), network.forward_flops()
