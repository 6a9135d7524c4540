"""int8 tokens on their way to the device: half the bytes are copied, then fp16 is restored there.

Shape suffixes: B samples, N tokens, C channels, K scale rows (CLS where it is taken, then patches).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_lit.tokens.store.storage import dequantise


@dataclass(frozen=True)
class PackedTokens:
    """Stored int8 tokens with the scales that restore them."""

    stored_BNC: Tensor
    scale_KC: Tensor
    token_BN: Tensor | None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        stored_BNC = self.stored_BNC.to(device, non_blocking=non_blocking)
        scale_KC = self.scale_KC.to(device, non_blocking=non_blocking)
        token_BN = self.token_BN
        if token_BN is not None:
            token_BN = token_BN.to(device, non_blocking=non_blocking)
        return PackedTokens(stored_BNC, scale_KC, token_BN)

    def restore(self) -> Tensor:
        """Return the tokens `[B, N, C]` in fp16, on their device."""
        scale_NC = self.scale_KC[-1:].expand(self.stored_BNC.shape[1], -1)
        if len(self.scale_KC) > 1:
            scale_NC = torch.cat((self.scale_KC[:1], scale_NC[1:]))
        return dequantise(self.stored_BNC, scale_NC, self.token_BN)


Batch = dict[str, Tensor]
PackedBatch = dict[str, Tensor | PackedTokens]


def restored(batch: PackedBatch) -> Batch:
    """Return a batch with its int8 tokens restored."""
    return {
        key: value.restore() if isinstance(value, PackedTokens) else value
        for key, value in batch.items()
    }


def on_device(batch: PackedBatch, device: torch.device) -> Batch:
    """Return a batch with its tokens on a device, int8 ones restored there.

    Ids and epochs stay on the CPU, where seeds are mixed.
    """
    out = dict(batch)
    for key in batch.keys() - {"sample", "epoch"}:
        out[key] = batch[key].to(device, non_blocking=True)
    return restored(out)
