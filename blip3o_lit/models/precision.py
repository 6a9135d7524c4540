"""The number formats of a run: one frozen description per word of the precision group.

Nothing else in the package interprets the words; all of it asks these fields.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """Return autocast's format for the fp32 average: the run's own where the device has it."""
        if not self.low:
            return None
        return self.products if torch.device(device).type == "cuda" else torch.bfloat16


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
"""By word; the words are `config.trainer.PRECISIONS`."""


def cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of linear layers in place, as autocast would at each of their calls.

    Autocast keeps a cast weight only while it can get a gradient, so a network without gradients
    would cast all of them at every evaluation of every solver step. The results stay the same.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            layer.to(dtype)
