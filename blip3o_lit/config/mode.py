"""Mode group: which view of the stored tokens a run uses."""

from dataclasses import dataclass

from blip3o_lit.config.checks import check_fields, choice


@dataclass
class ModeConfig:
    """A view of full token stores."""

    name: str = choice("patch_only", ("patch_only", "cls_patch", "grid_64"))
    """patch_only: the patch grid; cls_patch: CLS and patches; grid_64: an 8x8 grid of averages."""
    projected: bool = False
    """Put each token through its tower's own final norm and projection first."""

    def __post_init__(self) -> None:
        check_fields(self, "mode.")
