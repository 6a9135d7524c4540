"""The LightningDataModule over a token store: both splits, their scales and their loaders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.shape import PairShape
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.tokens.reading.batches import BatchPlan, batch_plan
from blip3o_lit.tokens.reading.loader import TokenLoader, ValidationLoader
from blip3o_lit.tokens.reading.mixed_order import order_of
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.packed import Batch, PackedBatch, on_device
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.store_set import StoreSet
from blip3o_lit.tokens.statistics import (
    Moments,
    Standardizer,
    kept_standardizers,
    mixture_moments,
    moments_of,
    reader_batches,
)

TRAIN, VALIDATION = "train", "validation"


def run_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of a data module that are the same whatever a run reads."""
    return {
        "data": config.data,
        "mode": config.mode,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "micro_batch_size": config.micro_batch_size,
        "validation_images": config.evaluation.images,
    }


class TokenDataModule(pl.LightningDataModule):
    """Token pairs of a store (a folder or URL), or of several, seen through one mode.

    `open()` needs no Trainer; after it `shape`, `train`, `validation` and the standardizers are
    there. The run is one Lightning epoch of `steps * accumulation` micro-batches. `batch_size`
    counts over all processes; without `micro_batch_size` each takes its share in one pass.
    """

    shape: PairShape
    train: TokenReader
    validation: TokenReader | None
    facts: dict[str, Any]
    """What a run's record says of its data: path, content hash, and each store of several."""
    condition_standardizer: Standardizer | None
    """Of the condition's grid; None where words are the whole condition."""
    target_standardizer: Standardizer
    words_standardizer: Standardizer | None
    """Of words, one mean and std per channel `[1, E]`; None without words."""

    def __init__(
        self,
        data: DataConfig,
        mode: ModeConfig,
        store: Path | str | dict[str, float | None],
        seed: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        steps: int | None = None,
        validation_images: int | None = None,
    ) -> None:
        super().__init__()
        self.data, self.mode = data, mode
        self.stores = store if isinstance(store, dict) else {str(store): None}
        self.store_path = " + ".join(self.stores)
        self.seed, self.batch_size, self.micro_batch_size = seed, batch_size, micro_batch_size
        self.steps = steps
        limits = [n for n in (data.validation_subset, validation_images) if n]
        self._validation_limit = min(limits) if limits else None

    def open(self, ranks: FirstRank = ALONE) -> None:
        """Open the stores, which are read as one, and load their statistics, the first rank's work.

        Stores of equal content are one.
        """
        data = self.data
        sides = (data.condition, data.target, self.mode)
        stores = self._stores(ranks)
        stores.check([*names_of(data.condition), data.target])
        self.train = train = stores.reader(
            TRAIN, *sides, data.max_shards, data.subset, weighted=True
        )
        self.validation = None
        if stores.with_split(VALIDATION):
            self.validation = stores.reader(VALIDATION, *sides, limit=self._validation_limit)
        self.shape = train.shape
        self.facts = {"path": stores.stores[0].address, "hash": train.content_hash}
        if len(stores.stores) > 1:
            self.facts["stores"] = stores.facts()
        images = data.statistics_images  # a store of a small share may give all of its own
        if not isinstance(train, MixedReader):
            images = min(images, len(train))

        def moments() -> Moments:
            if isinstance(train, MixedReader):
                return mixture_moments(train, images, data.threads)
            return moments_of(reader_batches(train, images, data.threads), train.shape)

        self._scale_by(kept_standardizers(train.content_hash, self.shape, images, moments, ranks))

    def _scale_by(self, scales: dict[str, Standardizer]) -> None:
        self.target_standardizer = scales["target"]
        self.condition_standardizer = scales.get("condition")
        self.words_standardizer = scales.get("words")

    def _stores(self, ranks: FirstRank) -> StoreSet:
        return StoreSet(self.stores, self.data)

    def steps_for(self, max_steps: int, max_epochs: int | None) -> int:
        """Set and return the run's optimizer steps; `max_epochs`, where given, wins.

        An epoch's last batch may reach into the next one: steps are rounded up.
        """
        if max_epochs is None:
            self.steps = max_steps
        else:
            self.steps = math.ceil(max_epochs * len(self.train) / self.batch_size)
        return self.steps

    def setup(self, stage: str) -> None:
        if not hasattr(self, "shape"):
            self.open()

    def _cut(self) -> tuple[BatchPlan, int, torch.cuda.Stream | None]:
        """Return the cut of a batch, this rank, and the stream of copies to a CUDA device."""
        rank, world_size, stream = 0, 1, None
        if self.trainer is not None:
            rank, world_size = self.trainer.global_rank, self.trainer.world_size
            device = self.trainer.strategy.root_device
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        return batch_plan(self.batch_size, self.micro_batch_size, world_size), rank, stream

    tower_bytes = tower_flops = 0
    """Memory of the data's own networks on a process, and their arithmetic per image."""

    def compile_towers(self) -> None:
        """Compile the data's own networks."""

    def encoded(self, batch: Batch) -> Batch:
        """Return a batch on the device with its tokens, which a store has ready."""
        return batch

    def transfer_batch_to_device(
        self, batch: PackedBatch, device: torch.device, dataloader_idx: int
    ) -> Batch:
        return on_device(batch, device)

    def train_dataloader(self) -> TokenLoader:
        if self.steps is None:
            raise UserError("the number of steps is unknown: give steps= or call steps_for")
        plan, rank, stream = self._cut()
        order = order_of(self.train, self.seed, self.data.shuffle_window)
        return TokenLoader(self.train, order, plan, self.steps, rank, self.data.threads, stream)

    def val_dataloader(self) -> ValidationLoader | list[ValidationLoader]:
        if self.validation is None:
            return []
        plan, rank, stream = self._cut()
        return ValidationLoader(
            self.validation, plan.micro_batch_size, rank, plan.world_size, self.data.threads, stream
        )
