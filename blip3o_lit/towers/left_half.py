"""A tower that sees the left half of each picture: what it gives leaves the other half open.

Shape suffixes: B images, N tokens (CLS first), C token width, S side of the input.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from blip3o_lit.towers.tower import Tower

GREY = (127, 127, 127)
"""What covers the right half: the middle of the pixels' range."""


class LeftHalf(Tower):
    """Another tower, behind a screen over the right half of every picture."""

    def __init__(self, tower: Tower) -> None:
        """Wrap a tower; its weights are shared."""
        super().__init__()
        self.tower = tower
        self.info = replace(
            tower.info,
            name=f"{tower.info.name}, left half",
            preprocessing={**tower.info.preprocessing, "visible": "left half"},
        )

    def preprocess(self, image: Image.Image) -> Tensor:
        """Cover the right half, then do as the tower does; returns `[3, S, S]`."""
        covered = image.convert("RGB")
        half = covered.width // 2
        covered.paste(GREY, (half, 0, covered.width, covered.height))
        return self.tower.preprocess(covered)

    @torch.no_grad()
    def tokens(self, images_B3SS: Tensor) -> Tensor:
        """Return the tower's tokens `[B, N, C]`."""
        return self.tower.tokens(images_B3SS)

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tower's norm and projection."""
        return self.tower.heads()
