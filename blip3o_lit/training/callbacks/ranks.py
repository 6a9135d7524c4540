"""The ranks of a run agree on what they train, or stop before the first step."""

from __future__ import annotations

import logging

import torch
from lightning import Callback, LightningModule, Trainer

from blip3o_lit.config.errors import UserError

log = logging.getLogger("blip3o_lit")


class OneConfig(Callback):
    """Compares a hash of config and tokens over all ranks when their process group stands.

    Ranks that were started with different overrides, or that see different token stores, would
    average the gradients of different runs without any error.
    """

    def __init__(self, digest: str) -> None:
        self.digest = digest

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        own = torch.tensor([int(self.digest[:15], 16)], device=trainer.strategy.root_device)
        digests = trainer.strategy.all_gather(own).flatten().tolist()
        different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        if different:
            raise UserError(
                f"rank {different[0]} trains another config or other tokens than rank 0, or into "
                "another folder: give all ranks the same command line and the same files"
            )
        log.info("%d ranks train one config: %s", trainer.world_size, self.digest)
