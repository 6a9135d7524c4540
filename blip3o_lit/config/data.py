"""Data group: which token store a run reads, and how; the testbeds with a known law."""

from dataclasses import dataclass, field
from typing import Any

from blip3o_lit.config.checks import above_zero, check_fields, choice, named, names_of, several
from blip3o_lit.config.errors import UserError, within
from blip3o_lit.config.extract import STORAGE

DEMOS = ("demo", "demo_masked", "demo_text", "demo_half_text")
"""Names of stores of scenes."""


@dataclass
class DemoConfig:
    """How many scenes the demo draws; their split is by the scans that they show."""

    images: int = above_zero(2048)
    """Training scenes."""
    validation_images: int = above_zero(512)
    """Validation scenes."""

    def __post_init__(self) -> None:
        check_fields(self, "data.demo.")


@dataclass
class SyntheticConfig:
    """What the testbeds share: how many images, of what shape, how well explained."""

    images: int = above_zero(16384)
    """Training images; the validation split holds a further `validation_images`."""
    validation_images: int = above_zero(2048)
    """Validation images."""
    grid: int = above_zero(4)
    """Side of the square token grid."""
    condition_width: int = above_zero(16)
    """Channels of a condition token."""
    target_width: int = above_zero(8)
    """Channels of a target token; in `ambiguous` at least as many as there are modes."""
    explained: float = 0.7
    """Share of the target's variance (within a mode) that the condition explains."""
    seed: int = 0
    """Seed of the problem itself (map, noise or modes, samples)."""


@dataclass
class LinearGaussianConfig(SyntheticConfig):
    """A synthetic problem whose posterior is known in closed form."""

    rank: int = 0
    """Rank of the map from condition to target; 0 means full."""
    outlier_channels: int = 0
    """Target channels that are 30 times larger than the rest, as real CLIP tokens have."""

    def __post_init__(self) -> None:
        check_fields(self, "data.linear_gaussian.")
        if not 0 < self.explained < 1:
            raise UserError(
                f"data.linear_gaussian.explained={self.explained} must lie between 0 and 1"
            )


@dataclass
class AmbiguousConfig(SyntheticConfig):
    """A mixture with known modes and weights: a regressor lands between them, a flow must not."""

    weights: list[float] = field(default_factory=lambda: [0.5, 0.3, 0.2])
    """Probability of each mode; they add up to 1. An image's tokens share its mode."""
    separation: float = above_zero(6.0)
    """Distance between two modes in a token, in standard deviations of what surrounds them."""

    def __post_init__(self) -> None:
        check_fields(self, "data.ambiguous.")
        within("data.ambiguous.explained", self.explained, 0.01, 0.99)
        total = sum(self.weights)
        if min(self.weights, default=0) <= 0 or abs(total - 1) > 1e-6:
            raise UserError(
                f"data.ambiguous.weights={self.weights} must be positive and add up to 1"
            )
        if len(self.weights) > self.target_width:
            raise UserError(
                f"data.ambiguous.target_width={self.target_width} is below the number of modes, "
                f"{len(self.weights)}"
            )


@dataclass
class DataConfig:
    """Where tokens come from and how they are read."""

    name: str = choice("demo", (*DEMOS, "tokens", "images", "linear_gaussian", "ambiguous"))
    """demo: handwritten-digit scenes, built on first use; demo_masked: the same, the condition sees
    their left half; demo_text, demo_half_text: with the words of their captions, to be joined with
    a grid or not; tokens: a directory; images: pictures, which the towers encode in front of the
    network; or a testbed with a known law: linear_gaussian, ambiguous."""
    tokens: Any = several(None)
    """A token store: a directory with index.json, or the address of one (s3:// gs:// hf://
    https://). Several: `[a, b]`, each sample once an epoch, or with weights `{a: 0.7, b: 0.3}`,
    shares of an epoch of the same length."""
    images: str | None = None
    """Of name=images: a folder, local tars, a .csv, .tsv or .jsonl, or demo, as in `extract`."""
    tower_batch: int | None = above_zero(None)
    """Of name=images: images that the towers take at a time; null: the micro-batch, or 16 where
    tokens are kept."""
    keep: str | None = None
    """Of name=images: a folder in which tokens are stored when they are first read, and read from
    then on. It becomes a store as `extract` makes it."""
    keep_storage: str = choice("float16", STORAGE)
    """Of data.keep: float16, bfloat16 (towers with large outliers), float32 or int8."""
    cache: str | None = None
    """Where shards of a store behind an address are kept; null: in the user's cache folder."""
    cache_gb: float | None = above_zero(None)
    """Size of that cache, in GB of 1e9 bytes; null: half of what the disk has to spare."""
    condition: Any = named("eva")
    """The stored array that conditions the flow: a grid, or a sequence (words); or one of each,
    `[eva,words]`."""
    target: str = "clip"
    """The stored array that the flow generates."""
    max_shards: int | None = above_zero(None)
    """Read only so many training shards."""
    subset: int | None = above_zero(None)
    """Read only so many training images."""
    validation_subset: int | None = above_zero(None)
    """Read only so many validation images."""
    threads: int = above_zero(2)
    """Reader threads (the seeds' num_workers)."""
    shuffle_window: int = above_zero(16)
    """Shards among which samples are shuffled."""
    statistics_images: int = above_zero(20000)
    """Training images from which channel statistics are computed; all of them if fewer exist."""
    scale: str = choice("channel", ("channel", "raw"))
    """channel: train on tokens of mean 0 and std 1 per channel; raw: on tokens as they are."""
    verify: str = choice("size", ("size", "full"))
    """size: check each shard's size when it is opened; full: its sha256 too."""
    demo: DemoConfig = field(default_factory=DemoConfig)
    """The scenes of name=demo, demo_masked, demo_text and demo_half_text."""
    linear_gaussian: LinearGaussianConfig = field(default_factory=LinearGaussianConfig)
    """The problem of name=linear_gaussian."""
    ambiguous: AmbiguousConfig = field(default_factory=AmbiguousConfig)
    """The problem of name=ambiguous."""

    def __post_init__(self) -> None:
        check_fields(self, "data.")
        if self.target in names_of(self.condition):
            raise UserError(
                f"data.condition={self.condition} equals data.target: choose two arrays"
            )
        if (self.name == "images") != bool(self.images) or (self.images and self.tokens):
            raise UserError(
                "data=images and data.images=SRC belong together, without data.tokens: a folder, "
                "tars, a table or demo"
            )
        if self.keep and self.name != "images":
            raise UserError(f"data.keep={self.keep} stores the tokens of data=images: leave it out")
        if self.images and len(names_of(self.condition)) > 1:
            raise UserError(
                f"data=images encodes pictures, no words: data.condition={self.condition}: extract "
                "them into a store first and give data=tokens data.tokens=DIR"
            )
        if self.name == "tokens" and not self.tokens:
            raise UserError(
                "data=tokens needs data.tokens=DIR, a folder that extract or convert wrote"
            )
