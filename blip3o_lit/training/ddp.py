"""DDP without what makes the host wait for the device in each micro-batch."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from inspect import signature
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

NEVER = 2**31 - 1
_NAMES = signature(DistributedDataParallel.__init__).parameters
_SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers"
"""The first is the newer name of what the second said."""


class DdpStrategy(DDPStrategy):
    """A replica a process; batches are left where the data module put them."""

    def __init__(self, backend: str, timeout: timedelta) -> None:
        # Buffers are equal on all ranks: standardizers, and scales that the module averages.
        buffers: dict[str, Any] = {_SYNC_BUFFERS: False}
        super().__init__(
            process_group_backend=backend,
            timeout=timeout,
            gradient_as_bucket_view=True,
            **buffers,
        )

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        # With device_ids DDP would move each sample's id and epoch to the GPU, and flow/draws.py
        # read them back. Gradients are best reduced from a stream that is not the default one.
        cuda = self.root_device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext():
            wrapped = DistributedDataParallel(model, **self._ddp_kwargs)
        wrapped._set_ddp_runtime_logging_sample_rate(NEVER)  # its timers wait for the device
        return wrapped
