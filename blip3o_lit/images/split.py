"""The split of an image by what it shows, so that near-identical files land on the same side.

The fingerprint is a coarse difference hash: the picture is averaged to 3x3 grey cells and each
cell is compared with its right and its lower neighbour. It survives another encoding, size or
colour profile; unlike images that share it share a split too, which does no harm.
"""

import hashlib

import numpy as np
from PIL import Image

from blip3o_lit.config.errors import one_of, within

RULES = ("perceptual", "content")
CELLS = 3
STEP = 20.0
"""Grey levels by which two cells must differ to count, far above what re-encoding moves one."""


def fingerprint(image: Image.Image) -> bytes:
    """Return 12 comparisons of three outcomes each (darker, alike, brighter) as bytes."""
    grey = image.convert("L").convert("F")  # in float: rounding a cell would cost more than JPEG
    cells = np.asarray(grey.resize((CELLS, CELLS), Image.Resampling.BOX))
    differences = np.concatenate([np.diff(cells, axis=0).ravel(), np.diff(cells, axis=1).ravel()])
    return (np.sign(differences) * (np.abs(differences) > STEP)).astype(np.int8).tobytes()


class Splitter:
    """Chooses `train` or `validation` for decoded pictures whose source gives no split.

    The rule is `perceptual` (by `fingerprint`) or `content` (by the pixels, exactly).
    """

    def __init__(self, rule: str, fraction: float, seed: int) -> None:
        one_of("split.by", rule, RULES)
        within("split.fraction", fraction, 0.0, 0.9)
        self.rule, self.fraction, self.seed = rule, fraction, seed

    @property
    def words(self) -> str:
        what = "a coarse difference hash" if self.rule == "perceptual" else "the decoded pixels"
        return f"sha256 of {what} of the source image, seed {self.seed}, {self.fraction:g} held out"

    def __call__(self, image: Image.Image) -> str:
        content = fingerprint(image) if self.rule == "perceptual" else image.tobytes()
        digest = hashlib.sha256(f"{self.seed}:".encode() + content).digest()
        held_out = int.from_bytes(digest[:6], "big") / 2**48 < self.fraction
        return "validation" if held_out else "train"
