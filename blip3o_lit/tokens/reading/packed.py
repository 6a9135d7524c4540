"""Batches on their way to the device: int8 tokens are copied as such, fp16 is restored there.

To a CUDA device the threads that read batches copy them too, on a stream of its own, so that a
batch comes while the one before it is computed on.

Words and their lengths travel beside the grids and become one `Condition` on the device.

Shape suffixes: B samples, N tokens, C channels, K scale rows (CLS where it is taken, then patches).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.base.condition import Condition
from blip3o_lit.tokens.store.int8 import dequantise


@dataclass(frozen=True)
class PackedTokens:
    """Stored int8 tokens with the scales that restore them."""

    stored_BNC: Tensor
    scale_KC: Tensor
    token_BN: Tensor | None

    def _each(self, function: Callable[[Tensor], Tensor]) -> PackedTokens:
        token_BN = None if self.token_BN is None else function(self.token_BN)
        return PackedTokens(function(self.stored_BNC), function(self.scale_KC), token_BN)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedTokens:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedTokens:
        return self._each(Tensor.pin_memory)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until what `stream` was given by now is done."""
        for tensor in (self.stored_BNC, self.scale_KC, self.token_BN):
            if tensor is not None:
                tensor.record_stream(stream)

    def restore(self) -> Tensor:
        """Return the tokens `[B, N, C]` in fp16, on their device."""
        scale_NC = self.scale_KC[-1:].expand(self.stored_BNC.shape[1], -1)
        if len(self.scale_KC) > 1:
            scale_NC = torch.cat((self.scale_KC[:1], scale_NC[1:]))
        return dequantise(self.stored_BNC, scale_NC, self.token_BN)


WORDS, LENGTH = "words", "length"
"""Keys of words `[B, L, E]` and their lengths `[B]` until they are a condition."""
Batch = dict[str, Any]
"""Tensors by name; `condition` is a `Condition` where a run has words."""
PackedBatch = dict[str, Tensor | PackedTokens]


def restored(batch: PackedBatch) -> Batch:
    """Return a batch with its int8 tokens restored, and its words in the condition."""
    out: Batch = {
        key: value.restore() if isinstance(value, PackedTokens) else value
        for key, value in batch.items()
    }
    if WORDS in out:
        words, length = out.pop(WORDS), out.pop(LENGTH)
        out["condition"] = Condition(out.get("condition"), words, length)
    return out


ON_CPU = ("sample", "epoch")
"""Ids and epochs stay there: seeds are mixed of them."""
COPIED = "copied"
"""Key of the CUDA event after a batch's copies."""


def uploaded(batch: PackedBatch, stream: torch.cuda.Stream | None) -> dict[str, Any]:
    """Begin to copy a batch to the device of `stream`; without one it stays where it is."""
    if stream is None:
        return batch
    with torch.cuda.stream(stream):
        out: dict[str, Any] = {
            key: value if key in ON_CPU else value.pin_memory().to(stream.device, non_blocking=True)
            for key, value in batch.items()
        }
        return out | {COPIED: stream.record_event()}


def on_device(batch: dict[str, Any], device: torch.device) -> Batch:
    """Return a batch with its tokens on a device, int8 ones restored there.

    What the device is given next waits for copies that are under way; the host does not.
    """
    out = dict(batch)
    copied = out.pop(COPIED, None)
    if copied is not None:
        torch.cuda.current_stream(device).wait_event(copied)
    for key in out.keys() - set(ON_CPU):
        out[key] = out[key].to(device, non_blocking=True)
        if copied is not None:
            out[key].record_stream(torch.cuda.current_stream(device))
    return restored(out)
