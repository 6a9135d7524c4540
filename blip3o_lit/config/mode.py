"""Mode group: which view of the stored tokens a run uses."""

from __future__ import annotations

from dataclasses import dataclass

from blip3o_lit.config.errors import one_of

MODES = ("patch_only", "cls_patch", "grid_64")


@dataclass
class ModeConfig:
    """A view of full token stores."""

    name: str = "patch_only"
    """patch_only: the patch grid; cls_patch: CLS and patches; grid_64: an 8x8 grid of averages."""
    projected: bool = False
    """Put each token through its tower's own final norm and projection first."""

    def __post_init__(self) -> None:
        """Check the name."""
        one_of("mode.name", self.name, MODES)
