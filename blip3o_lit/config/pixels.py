"""How pictures become pixels: keys of the extract and generate commands."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from blip3o_lit.config.errors import UserError


@dataclass
class PixelsConfig:
    """What is encoded of a picture; the defaults are what a viewer shows."""

    orientation: bool = True
    """Turn pictures upright by their EXIF orientation; false: not, as CLIP's own pipeline."""
    profile: bool = True
    """Convert colours from an embedded profile to sRGB; false takes the numbers as they are."""
    background: str = "white"
    """What lies below transparent pixels: a colour's name or #rrggbb."""

    def __post_init__(self) -> None:
        """Check the colour."""
        from PIL import ImageColor

        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise UserError(
                f"pixels.background={self.background} is no colour: a name or '\"#rrggbb\"'"
            ) from error

    def changes(self) -> dict[str, bool | str]:
        """Return what differs from the defaults, by key: it goes into the index."""
        return {key: v for key, v in asdict(self).items() if v != getattr(PixelsConfig, key)}
