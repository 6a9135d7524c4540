"""The schema of the convert command."""

from dataclasses import dataclass

from blip3o_lit.config.checks import above_zero, check_fields, choice
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import STORAGE


@dataclass
class ConvertConfig:
    """The seeds' pickles -> token shards; without thumbnails, for pickles hold no pictures."""

    source: str | None = None
    """blip3o_grid_embeddings.pkl, or the folder of embeddings_shard_*.pkl."""
    out: str | None = None
    """Folder of the token store; run the same line again to go on after an interruption."""
    mode: str = choice("auto", ("auto", "patch_only", "cls_patch", "grid_64"))
    """auto: all that the files hold; patch_only, cls_patch or grid_64: that alone."""
    missing_cls: str = choice("error", ("error", "mean"))
    """mean: the mean token stands in for a missing CLS token, as in the seeds; error: stop."""
    on_bad: str = choice("error", ("error", "reject"))
    """reject: leave out NaN samples and missing shards, listed in rejects.jsonl; error: stop."""
    split_rule: str = choice("hash", ("hash", "seed"))
    """hash: by content of the condition tokens; seed: the seeds' own shuffle of rows or shards."""
    validation_fraction: float = 0.1
    """Share of the validation split."""
    seed: int = 42
    """Seed of the split; the seeds used 42."""
    shard_samples: int = above_zero(256)
    """Samples of one output shard."""
    storage: str = choice("float16", STORAGE)
    """float16, bfloat16, float32, or int8 (with measured scales)."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction={self.validation_fraction} must be from 0 to below 1"
            )
