"""The schema of the export command."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import UserError


@dataclass
class ExportConfig:
    """Which checkpoint is exported, and where to."""

    ckpt: str = ""
    """A checkpoint file or a run directory."""
    out: str = ""
    """Folder for config.json, model.safetensors and README.md."""

    def __post_init__(self) -> None:
        """Check that both are given."""
        for key in ("ckpt", "out"):
            if not getattr(self, key):
                raise UserError(f"{key}=PATH is missing: export needs ckpt= and out=")
