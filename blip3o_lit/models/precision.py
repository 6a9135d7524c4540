"""The number formats of a run: one frozen description per word of the precision group.

Nothing else in the package interprets the words; all of it asks these fields.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """What one word of `precision=` means; the defaults are those of fp32."""

    name: str
    weights: torch.dtype = torch.float32
    """Format of the trained weights, their gradients and moments; the average is always fp32."""
    products: torch.dtype = torch.float32
    """Format that matrix products read."""
    matmul: str = "highest"
    """torch's word for fp32 products: highest, or high for TF32."""
    lightning: str = "32-true"
    """Lightning's word. It leaves `bf16_true` to the module, which keeps the average in fp32."""
    loss_scale: bool = False
    """Whether gradients need a loss scale."""
    cuda_only: bool = False
    """Whether CPUs and Apple GPUs lack it."""

    @property
    def low(self) -> bool:
        """Whether products read 16-bit numbers."""
        return self.products.itemsize == 2

    @property
    def autocast(self) -> torch.dtype | None:
        """Format that autocast gives products in training; None where there is no autocast."""
        return self.products if self.products != self.weights else None

    @property
    def kept_bytes(self) -> int:
        """Bytes of an activation kept for the backward pass, or of a weight in use."""
        return self.products.itemsize

    def inference(self, device: torch.device | str) -> torch.dtype | None:
        """Return autocast's format for the fp32 average: the run's own where it is fast."""
        kind = torch.device(device).type
        if not self.low or kind != "cuda" and not bf16_is_faster(kind):
            return None
        return self.products if kind == "cuda" else torch.bfloat16


PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision("fp32"),
        Precision("tf32", matmul="high", cuda_only=True),
        Precision("bf16", products=torch.bfloat16, lightning="bf16-mixed"),
        Precision("bf16_true", weights=torch.bfloat16, products=torch.bfloat16),
        Precision(
            "fp16", products=torch.float16, lightning="16-mixed", loss_scale=True, cuda_only=True
        ),
    )
}
"""By word; the words are those of `config.trainer.PRECISIONS` but `auto`."""
AUTO = "auto"
GAIN = 1.5
"""How much faster bf16 products must be to be worth their rounding; so large that two starts on
one machine, and two ranks, decide alike."""


@cache
def bf16_is_faster(device: str) -> bool:
    """Whether a device computes bf16 products faster than fp32 ones, measured for 0.2 s.

    CPUs without instructions for bf16 compute such products several times slower. The formats take
    turns, so that what else runs on the machine slows both.
    """
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    formats = torch.bfloat16, torch.float32
    turns = [[product_seconds(device, form, window=0.01) for form in formats] for _ in range(10)]
    bf16, fp32 = (min(column) for column in zip(*turns))
    return GAIN * bf16 < fp32


def product_seconds(
    device: torch.device | str,
    dtype: torch.dtype,
    shape: tuple[int, int, int] = (1024, 256, 512),
    window: float = 0.05,
) -> float:
    """Return the best time of a matrix product in `window` seconds of them, after one to warm up.

    Args:
        device: Where it is computed.
        dtype: Format of both factors.
        shape: I, J, K of [I, J] @ [J, K]; by default about those of a small network.
        window: Seconds to repeat it for.
    """
    rows, inner, columns = shape
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)
    torch.mm(a, b.T)
    best, end = float("inf"), time.perf_counter() + window
    while True:
        started = time.perf_counter()
        torch.mm(a, b.T)[0, 0].item()  # waits for an accelerator
        now = time.perf_counter()
        best = min(best, now - started)
        if now > end:
            return best


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear layers in place, as autocast would at each of their calls.

    Autocast keeps a cast weight only while it can get a gradient, so a network without gradients
    would cast all of them at every evaluation of every solver step. The results stay the same.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
