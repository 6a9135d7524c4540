"""A tower that sees the left half of each picture: what it gives leaves the other half open."""

from __future__ import annotations

from dataclasses import replace

from PIL import Image
from torch import Tensor

from blip3o_lit.towers.tower import Tower

GREY = (127, 127, 127)
"""What covers the right half: the middle of the pixels' range."""


class LeftHalf(Tower):
    """Another tower, behind a screen over the right half of every picture."""

    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.tower = tower
        self.info = replace(
            tower.info,
            name=f"{tower.info.name}, left half",
            preprocessing={**tower.info.preprocessing, "visible": "left half"},
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        covered = image.convert("RGB")
        covered.paste(GREY, (covered.width // 2, 0, covered.width, covered.height))
        return self.tower.preprocess(covered)

    def tokens(self, images_B3SS: Tensor) -> Tensor:
        return self.tower.tokens(images_B3SS)

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        return self.tower.heads()
