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
    """Folder for config.json, model.safetensors, heads.safetensors and README.md."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face Hub to upload to, ORG/NAME."""
    private: bool = True
    """Whether a repository that is made for it is private."""

    def __post_init__(self) -> None:
        """Check that there is something to export, and a place for it."""
        if not self.ckpt:
            raise UserError("ckpt=PATH is missing: name a checkpoint or a run directory")
        if not self.out and not self.push_to_hub:
            raise UserError("out=DIR is missing: give it, or push_to_hub=ORG/NAME")
