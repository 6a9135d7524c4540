"""Straight from pictures, or by a token store: what each of the two costs (`plan=true`)."""

import shutil
from dataclasses import dataclass

from blip3o_lit.base.units import human_time
from blip3o_lit.budget.machine import GPUS
from blip3o_lit.budget.plan import Plan
from blip3o_lit.extraction.direct.datamodule import PictureDataModule
from blip3o_lit.extraction.encoding import TowerSet

DECODED = 200
"""Images that a core decodes and prepares per second, about (`python -m benchmarks`)."""
STORAGES = {"float16": 1.0, "int8": 0.5}
"""Formats of a store, and their share of fp16's bytes; int8 costs a model nothing that is seen."""


@dataclass(frozen=True)
class TwoWays:
    """Arithmetic and bytes of both ways to train on pictures."""

    tower_flops: float
    """Of both towers, for one image."""
    train_flops: float
    """Of a training step's share, for one image."""
    images: int
    """In the source, held-out ones included."""
    seen: int
    """That training takes, repeats included."""
    store_bytes: float
    """Of a store in fp16."""
    disk: float

    @property
    def direct(self) -> float:
        """Arithmetic of a run that encodes what it sees."""
        return self.seen * (self.tower_flops + self.train_flops)

    @property
    def by_store(self) -> float:
        """Arithmetic of an extraction of every image, and of a run on its store."""
        return self.images * self.tower_flops + self.seen * self.train_flops

    @property
    def by_keeping(self) -> float:
        """Arithmetic of a run that stores what it encodes, each image when it is first seen."""
        return min(self.seen, self.images) * self.tower_flops + self.seen * self.train_flops

    @property
    def storage(self) -> str | None:
        """The first format in which a store fits the disk."""
        fitting = (n for n, share in STORAGES.items() if share * self.store_bytes <= self.disk)
        return next(fitting, None)

    @property
    def cheaper(self) -> str:
        """Which way takes less arithmetic among those that the disk allows."""
        if self.storage is None or self.direct <= self.by_store:
            return "images"
        return "store"

    def verdict(self, hours: float) -> str:
        """Return the cheaper way in words; `hours` are GPU hours of one FLOP."""
        times = f"an image is seen {self.seen / self.images:.1f} times"
        saved = abs(self.direct - self.by_store) * hours
        if self.cheaper == "store":
            return f"a store ({self.storage}), by {saved:.1f} GPU hours: {times}"
        if self.direct <= self.by_store:
            return f"from images, by {saved:.1f} GPU hours: {times}"
        return f"from images: no store fits the disk, which would save {saved:.1f} GPU hours"


def two_ways(plan: Plan, data: PictureDataModule) -> TwoWays:
    shapes, config = data.train.store.shapes, plan.config
    stored = TowerSet(shapes.towers, False, "float16", device="meta", thumbnails=True)
    images = data.train.store.listing.images
    free = shutil.disk_usage(".").free
    return TwoWays(
        tower_flops=data.tower_flops,
        train_flops=plan.step_flops / config.batch_size,
        images=images,
        seen=plan.steps * config.batch_size,
        store_bytes=float(stored.sample_bytes * images),
        disk=free if config.disk is None else 1e9 * config.disk,
    )


def picture_rows(plan: Plan, data: PictureDataModule) -> list[tuple[str, str]]:
    """Return what the towers add to a run, and which way is cheaper."""
    ways, config = two_ways(plan, data), plan.config
    gpu = GPUS[config.gpu]
    speed = config.mfu * (gpu.low if plan.placement.precision.low else gpu.full)
    hours = 1 / speed / 3600
    world, towers = plan.placement.world, data.train.store.shapes.towers
    each = " + ".join(f"{name} {cost.flops / 1e12:.3g}" for name, cost in zip(towers, data.costs))
    share = ways.tower_flops / (ways.tower_flops + ways.train_flops)
    rate = world * speed / (ways.tower_flops + ways.train_flops)
    size = " or ".join(
        f"{part * ways.store_bytes / 1e9:,.1f} GB ({name})" for name, part in STORAGES.items()
    )
    extraction = ways.images * ways.tower_flops * hours
    return [
        (
            "towers",
            f"{each} TFLOP an image beside {ways.train_flops / 1e12:.3g} of a training step: "
            f"{share:.0%} of the arithmetic; {data.tower_bytes / 1e9:.1f} GB on each device",
        ),
        (
            "from images",
            f"{human_time(ways.direct * hours * 3600 / world)} ({ways.direct * hours:.1f} GPU "
            f"hours), no disk; {rate:,.0f} images/s, decoded by about "
            f"{max(1, round(rate / DECODED))} cores",
        ),
        (
            "by a store",
            f"{human_time(ways.by_store * hours * 3600 / world)} ({ways.by_store * hours:.1f} GPU "
            f"hours, {extraction:.1f} of them once); {size}, {ways.disk / 1e9:,.0f} GB are free",
        ),
        (
            "by data.keep",
            f"{human_time(ways.by_keeping * hours * 3600 / world)} "
            f"({ways.by_keeping * hours:.1f} GPU hours), the same disk, no extraction before",
        ),
        ("cheaper", ways.verdict(hours)),
    ]
