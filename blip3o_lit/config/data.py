"""Data group: which token store a run reads, and how."""

from __future__ import annotations

from dataclasses import dataclass, field

from blip3o_lit.config.ambiguous import AmbiguousConfig
from blip3o_lit.config.errors import UserError, one_of, positive

DATA_NAMES = ("demo", "demo_masked", "tokens", "linear_gaussian", "ambiguous")
SCALES = ("channel", "raw")
VERIFY = ("size", "full")


@dataclass
class LinearGaussianConfig:
    """A synthetic problem whose posterior is known in closed form."""

    images: int = 16384
    """Training images; the validation split holds a further `validation_images`."""
    validation_images: int = 2048
    """Validation images."""
    grid: int = 4
    """Side of the square token grid."""
    condition_width: int = 16
    """Channels of a condition token."""
    target_width: int = 8
    """Channels of a target token."""
    explained: float = 0.7
    """Share of the target's variance that the condition explains, between 0 and 1."""
    rank: int = 0
    """Rank of the map from condition to target; 0 means full."""
    outlier_channels: int = 0
    """Target channels that are 30 times larger than the rest, as real CLIP tokens have."""
    seed: int = 0
    """Seed of the problem itself (map, noise, samples)."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for key in ("images", "validation_images", "grid", "condition_width", "target_width"):
            positive(f"data.linear_gaussian.{key}", getattr(self, key))
        if not 0 < self.explained < 1:
            raise UserError(
                f"data.linear_gaussian.explained={self.explained} must lie between 0 and 1"
            )


@dataclass
class DataConfig:
    """Where tokens come from and how they are read."""

    name: str = "demo"
    """demo: handwritten-digit scenes, built on first use; demo_masked: the same, the condition sees
    their left half; tokens: a directory; or a testbed with a known law: linear_gaussian,
    ambiguous."""
    tokens: str | None = None
    """A token store: a directory with index.json, or the URL of one."""
    condition: str = "eva"
    """The stored array that conditions the flow."""
    target: str = "clip"
    """The stored array that the flow generates."""
    max_shards: int | None = None
    """Read only so many training shards."""
    subset: int | None = None
    """Read only so many training images."""
    validation_subset: int | None = None
    """Read only so many validation images."""
    threads: int = 2
    """Reader threads (the seeds' num_workers)."""
    shuffle_window: int = 16
    """Shards among which samples are shuffled."""
    statistics_images: int = 20000
    """Training images from which channel statistics are computed; all of them if fewer exist."""
    scale: str = "channel"
    """channel: train on tokens of mean 0 and std 1 a channel; raw: on tokens as they are stored."""
    verify: str = "size"
    """size: check each shard's size when it is opened; full: its sha256 too."""
    linear_gaussian: LinearGaussianConfig = field(default_factory=LinearGaussianConfig)
    """The problem of name=linear_gaussian."""
    ambiguous: AmbiguousConfig = field(default_factory=AmbiguousConfig)
    """The problem of name=ambiguous."""

    def __post_init__(self) -> None:
        """Check each value and the rules that join them."""
        one_of("data.name", self.name, DATA_NAMES)
        one_of("data.scale", self.scale, SCALES)
        one_of("data.verify", self.verify, VERIFY)
        for key in ("max_shards", "subset", "validation_subset", "threads", "shuffle_window"):
            positive(f"data.{key}", getattr(self, key))
        positive("data.statistics_images", self.statistics_images)
        if self.condition == self.target:
            raise UserError(
                f"data.condition={self.condition} equals data.target: choose two arrays"
            )
        if self.name == "tokens" and not self.tokens:
            raise UserError(
                "data=tokens needs data.tokens=DIR, a folder that extract or convert wrote"
            )
