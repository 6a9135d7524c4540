"""The data module over pictures: towers on the run's device in front of the network."""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.progress import Work
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.extraction.direct.store import PIXELS, PictureReader, PictureStore
from blip3o_lit.extraction.engine import device_of
from blip3o_lit.tokens.datamodule import TRAIN, VALIDATION, TokenDataModule, run_settings
from blip3o_lit.tokens.reading.loader import prefetch
from blip3o_lit.tokens.reading.packed import Batch
from blip3o_lit.tokens.statistics import READ_SAMPLES, cached_standardizers, spread_ids
from blip3o_lit.towers.tower import TowerCost, tower_cost


def tower_device(config: TrainConfig) -> str:
    """Return where this process's towers run: on its GPU, if the run is on one."""
    return "cpu" if config.trainer.accelerator in ("cpu", "mps") else device_of("auto")


class PictureDataModule(TokenDataModule):
    """Token pairs that the towers make of pictures while training goes on; nothing is stored."""

    train: PictureReader
    validation: PictureReader | None

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(store=config.data.images or "", **run_settings(config))
        self.config = config

    def open(self, ranks: FirstRank = ALONE, statistics: bool = True) -> None:
        """List the pictures and compute or load the statistics.

        Without `statistics` nothing is decoded and no weights are read: enough for a plan.
        """
        config, data = self.config, self.data
        store = PictureStore(config, tower_device(config), statistics, ranks)
        sides = (data.condition, data.target, self.mode)
        self.train = train = PictureReader(store, TRAIN, *sides, data.max_shards, data.subset)
        self.validation = None
        if VALIDATION in store.index.splits:
            limit = self._validation_limit
            self.validation = PictureReader(store, VALIDATION, *sides, limit=limit)
        self.shape = train.shape
        fingerprint = store.listing.hash
        self.facts = {
            "path": self.store_path,
            "hash": train.content_hash,
            "images": fingerprint,
        }
        if not statistics:
            return
        _ = store.towers  # loaded once, before threads ask for them
        images = min(data.statistics_images, len(train))
        self._scale_by(
            cached_standardizers(
                train.content_hash, self.shape, images, lambda: self._batches(train, images), ranks
            )
        )

    def _batches(self, reader: PictureReader, images: int) -> Iterator[Batch]:
        ids = spread_ids(reader.shard_sizes, images)
        pieces = np.split(ids, range(READ_SAMPLES, len(ids), READ_SAMPLES))
        with Work("measuring channels", len(ids), "images") as work:
            for batch in prefetch(reader.read_packed, pieces, self.data.threads):
                encoded = reader.encode(batch)  # type: ignore[arg-type]
                yield encoded
                work.advance(len(encoded["condition"]))

    @cached_property
    def costs(self) -> list[TowerCost]:
        """Parameters, bytes and arithmetic of both towers."""
        return [tower_cost(tower) for tower in self.train.store.shapes.towers.values()]

    @property
    def tower_bytes(self) -> int:
        return sum(cost.bytes for cost in self.costs)

    @property
    def tower_flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    def compile_towers(self) -> None:
        self.train.store.towers.compile()

    def encoded(self, batch: Batch) -> Batch:
        """Put a batch's pictures through the towers, outside of the run's autocast."""
        towers = self.train.store.towers
        device = next(v.device for key, v in batch.items() if key.startswith(PIXELS))
        if towers.device != device:
            towers.move(device)
            for view in self.train.views.values():
                if view.head is not None:
                    view.head.to(device)
        with torch.autocast(device.type, enabled=False):
            return self.train.encode(batch)
