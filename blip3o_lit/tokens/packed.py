"""int8 tokens on their way to the device: half the bytes are copied, then fp16 is restored there.

Shape suffixes: B samples, N tokens, C channels, K scale rows (CLS where it is taken, then patches).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blip3o_lit.tokens.storage import dequantise


@dataclass(frozen=True)
class PackedTokens:
    """Stored int8 tokens with the scales that restore them."""

    stored_BNC: Tensor
    scale_KC: Tensor
    token_BN: Tensor | None
    """A scale a token, where the store has them."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        """Copy tokens and scales to a device."""
        token_BN = self.token_BN
        return PackedTokens(
            self.stored_BNC.to(device, non_blocking=non_blocking),
            self.scale_KC.to(device, non_blocking=non_blocking),
            None if token_BN is None else token_BN.to(device, non_blocking=non_blocking),
        )

    def restore(self) -> Tensor:
        """Return the tokens `[B, N, C]` in fp16, on their device."""
        patches_NC = self.scale_KC[-1:].expand(self.stored_BNC.shape[1], -1)
        with_cls = len(self.scale_KC) > 1
        scale_NC = torch.cat((self.scale_KC[:1], patches_NC[1:])) if with_cls else patches_NC
        return dequantise(self.stored_BNC, scale_NC, self.token_BN)


PackedBatch = dict[str, Tensor | PackedTokens]


def restored(batch: Mapping[str, Tensor | PackedTokens]) -> dict[str, Tensor]:
    """Return a batch with its int8 tokens restored."""
    return {
        key: value.restore() if isinstance(value, PackedTokens) else value
        for key, value in batch.items()
    }


def on_device(batch: PackedBatch, device: torch.device) -> dict[str, Tensor]:
    """Return a batch with its tokens on a device, int8 ones restored there.

    Ids and epochs stay on the CPU, where seeds are mixed.
    """
    stays = ("sample", "epoch")
    return restored(
        {
            key: value if key in stays else value.to(device, non_blocking=True)
            for key, value in batch.items()
        }
    )
