"""The machine that a run is laid out on: this one, or one imagined for `plan=true`."""

import math
import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.models.precision import Precision, product_seconds


@dataclass(frozen=True)
class Gpu:
    """A GPU's data sheet: dense peaks of matrix products in FLOP/s, and its memory in bytes."""

    low: float
    """bf16 and fp16."""
    full: float
    """fp32, or TF32 where the GPU has it."""
    memory: float


GPUS = {
    "H200 NVL": Gpu(835e12, 417e12, 141e9),
    "H200": Gpu(989e12, 494e12, 141e9),
    "H100 PCIe": Gpu(756e12, 378e12, 80e9),
    "H100 NVL": Gpu(835e12, 417e12, 94e9),
    "H100": Gpu(989e12, 494e12, 80e9),
    "A100": Gpu(312e12, 156e12, 80e9),
    "L40S": Gpu(362e12, 183e12, 48e9),
    "RTX 4090": Gpu(165e12, 82e12, 24e9),
}
"""By the first of the names that a card's own name has in it."""


@dataclass(frozen=True)
class Machine:
    """What `placement.resolve` needs to know of a machine and of who started the processes."""

    device: str
    """cpu, cuda or mps."""
    name: str
    devices: int
    """Devices of a node that `trainer.devices=auto` takes: all GPUs, one process on a CPU."""
    memory: int
    """Bytes of one device; of a CPU, all of the machine's."""
    launcher: str = "plain"
    """plain, torchrun, srun, or plan for an imagined machine."""
    processes: int | None = None
    """Processes of a node that the launcher starts; None where Lightning starts them."""
    nodes: int | None = None
    """Nodes that the launcher uses; None where nobody said so."""
    bf16: bool = True
    """Whether the device computes products of this format."""
    tf32: bool = True
    float8: bool = False
    compiles: bool = False
    """Whether `model.compile=auto` compiles here."""
    precision: str = "bf16"
    """The word that `precision=auto` stands for here."""

    @property
    def imagined(self) -> bool:
        return self.launcher == "plan"

    def memory_of_process(self, processes: int) -> float:
        """Return each one's bytes where a node has so many: those on a CPU share its memory."""
        return self.memory / processes if self.device == "cpu" else self.memory


def this_machine(accelerator: str) -> Machine:
    """Return the machine that this process runs on, by the word of trainer.accelerator."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no CUDA GPU: use cpu")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise UserError("trainer.accelerator=mps: this machine has no Apple GPU: use cpu")
    if accelerator not in ("cpu", "mps") and torch.cuda.is_available():
        return Machine(
            device="cuda",
            name=torch.cuda.get_device_name(0),
            devices=torch.cuda.device_count(),
            memory=torch.cuda.get_device_properties(0).total_memory,
            bf16=torch.cuda.is_bf16_supported(False),
            tf32=torch.cuda.get_device_capability(0) >= (8, 0),
            float8=torch.cuda.get_device_capability(0) >= (8, 9),
            compiles=_has_compilers(),
        )
    apple = accelerator != "cpu" and torch.backends.mps.is_available()
    device = "mps" if apple else "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(device, device, 1, memory)


def imagined_machine(gpu: str, processes: int) -> Machine:
    """Return a node of `processes` GPUs of one kind, for `plan=true`."""
    if gpu not in GPUS:
        raise UserError(f"gpu={gpu} is unknown: choose from {', '.join(GPUS)}")
    memory = int(GPUS[gpu].memory)
    return Machine(
        "cuda", gpu, processes, memory, "plan", processes, nodes=1, float8=True, compiles=True
    )


def _has_compilers() -> bool:
    """Whether Triton is there, and the C compiler that it builds its launchers with."""
    compilers = (os.environ.get("CC") or "cc", "gcc", "clang")
    return find_spec("triton") is not None and any(shutil.which(name) for name in compilers)


def peak_flops(device: torch.device, name: str, precision: Precision) -> float:
    """Return one device's peak FLOP/s of matrix products: from its data sheet, else measured."""
    if device.type == "cuda":
        for known, gpu in GPUS.items():
            if known in name:
                return gpu.low if precision.low else gpu.full
    # A product that takes far longer than its launch.
    shape = (8192, 8192, 8192) if device.type == "cuda" else (2048, 1024, 2048)
    return 2 * math.prod(shape) / product_seconds(device, precision.products, shape)
