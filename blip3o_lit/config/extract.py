"""The schema of the extract command."""

from dataclasses import dataclass, field

from blip3o_lit.config.checks import above_zero, between, check_fields, choice
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import PixelsConfig, TowersConfig

STORAGE = ("float16", "bfloat16", "float32", "int8")


@dataclass
class SplitConfig:
    """The split of images whose source gives none; a given split wins."""

    by: str = choice("perceptual", ("perceptual", "content"))
    """perceptual: by a coarse look, so that copies stay together; content: by the exact pixels."""
    fraction: float = between(0.05, 0.0, 0.9)
    """Share of validation images."""
    seed: int = 0
    """Another seed holds other images out."""
    file: str | None = None
    """A .csv or .jsonl of path and split; it wins over every other rule."""

    def __post_init__(self) -> None:
        check_fields(self, "split.")


@dataclass
class EngineConfig:
    """How the work is done: batches, threads and workers."""

    batch_size: int = above_zero(16)
    """Images of one forward pass; raise it on a GPU until its memory is used."""
    threads: int = above_zero(4)
    """Threads that decode and resize while the towers run."""
    shard_samples: int = above_zero(256)
    """Images of one unit of work, which becomes one shard of each split that occurs in it."""
    shard: str | None = None
    """i/n: this is worker i (from 0) of n; null: from torchrun, a Slurm array, or 0/1."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    compile: bool = False
    """Run the towers through torch.compile."""

    def __post_init__(self) -> None:
        check_fields(self, "extract.")


@dataclass
class ExtractConfig:
    """Images -> token shards."""

    images: str | None = None
    """A folder, WebDataset tars ({0..9}, hf:// https:// s3://), a .csv or .jsonl, or demo."""
    out: str | None = None
    """Folder of the token store; run the same line again to go on after an interruption."""
    towers: TowersConfig = field(default_factory=TowersConfig)
    """The pair of encoders."""
    split: SplitConfig = field(default_factory=SplitConfig)
    """Which images are held out."""
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    """How pictures become pixels."""
    extract: EngineConfig = field(default_factory=EngineConfig)
    """Batches, threads and workers."""
    storage: str = choice("float16", STORAGE)
    """float16, bfloat16 (towers with large outliers), float32, or int8 (with measured scales)."""
    store: str = choice("full", ("full", "grid_64"))
    """full: all tokens; grid_64: 8x8 averages of projected tokens, 5 to 10 times smaller."""
    thumbnails: bool = True
    """Keep a small JPEG per image, to draw tokens by; false: for stores that are passed on."""
    captions: int = above_zero(5)
    """With towers.text.kind: captions of an image whose words are kept, at most."""
    classes: str | None = None
    """Class names for zero-shot: a .txt, one per line, or a .json of names and their prompts."""
    max_reject_fraction: float = between(0.1, 0.0, 1.0)
    """Stop when more images than this share can't be read."""
    append: bool = False
    """Add to a finished store in `out` the images that it does not hold; the others stay as they
    are, each in its split."""
    dry_run: bool = False
    """Print what it would take (arithmetic, hours, memory, disk) and stop; reads no weights."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.append and self.classes:
            raise UserError(f"append=true keeps the store's classes: leave classes={self.classes}")
        if self.images == "":
            raise UserError("images= is empty: give a folder, tars, a .csv or .jsonl, or demo")
