"""The schema of the convert command."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError, one_of, positive

MODES = ("auto", "patch_only", "cls_patch", "grid_64")
SPLIT_RULES = ("hash", "seed")


@dataclass
class ConvertConfig:
    """The seeds' pickles -> token shards."""

    source: str | None = None
    """blip3o_grid_embeddings.pkl, or the folder of embeddings_shard_*.pkl."""
    out: str | None = None
    """Folder of the token store; run the same line again to go on after an interruption."""
    mode: str = "auto"
    """auto: all that the files hold; patch_only, cls_patch or grid_64: that alone."""
    missing_cls: str = "error"
    """mean: the mean token stands in for a missing CLS token, as in the seeds; error: stop."""
    on_bad: str = "error"
    """reject: leave out NaN samples and missing shards, listed in rejects.jsonl; error: stop."""
    split_rule: str = "hash"
    """hash: by content of the condition tokens; seed: the seeds' own shuffle of rows or shards."""
    validation_fraction: float = 0.1
    """Share of the validation split."""
    seed: int = 42
    """Seed of the split; the seeds used 42."""
    shard_samples: int = 256
    """Samples of one output shard."""
    storage: str = "float16"
    """float16, bfloat16, float32, or int8 (with measured scales)."""

    def __post_init__(self) -> None:
        """Check each value."""
        one_of("mode", self.mode, MODES)
        one_of("missing_cls", self.missing_cls, ("error", "mean"))
        one_of("on_bad", self.on_bad, ("error", "reject"))
        one_of("split_rule", self.split_rule, SPLIT_RULES)
        one_of("storage", self.storage, ("float16", "bfloat16", "float32", "int8"))
        positive("shard_samples", self.shard_samples)
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"validation_fraction={self.validation_fraction} must be from 0 to below 1"
            )
