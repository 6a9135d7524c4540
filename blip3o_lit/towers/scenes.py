"""Demo pictures: captioned scenes of one to three real handwritten digits on a coloured ground.

The digits are the 1,797 scans of 8x8 pixels that ship with scikit-learn (UCI "Optical Recognition
of Handwritten Digits"), so no download is needed. A scan belongs to the training or the validation
split by a hash of its pixels; no scan of a validation scene is ever in a training scene.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from blip3o_lit.config.errors import UserError, one_of

SIZE = 64
"""Side of a scene, in pixels."""
SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.2
VERSION = 1
"""Raised whenever the same (split, index, seed) would give another picture."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (235, 45, 45),
    "orange": (250, 150, 30),
    "yellow": (245, 230, 60),
    "green": (50, 200, 70),
    "cyan": (60, 225, 230),
    "blue": (60, 110, 250),
    "purple": (165, 70, 225),
    "pink": (255, 145, 190),
}
PLACES = {
    "top left": (12, 12),
    "top": (32, 12),
    "top right": (52, 12),
    "left": (12, 32),
    "centre": (32, 32),
    "right": (52, 32),
    "bottom left": (12, 52),
    "bottom": (32, 52),
    "bottom right": (52, 52),
}
"""Centre (x, y) of each place, in pixels; a digit strays from it by at most 2."""
MIN_SIDE, MAX_SIDE = 17, 24
CUMULATIVE = (0.25, 0.6)
"""Share of scenes with one digit, and with one or two; the rest has three."""
MOST_DIGITS = 3
_COLOURS = [(name, np.array(rgb, np.float32)) for name, rgb in COLOURS.items()]
_PLACES = list(PLACES.items())
WORDS = tuple(sorted({*DIGITS, *COLOURS, *" ".join(PLACES).split(), "a", "an", "at", "the", ","}))
"""Every word of every caption."""


@dataclass(frozen=True)
class Scene:
    image: Image.Image
    caption: str
    """For example `a red seven at the top left, a blue two at the centre`."""
    key: str
    """Unique over splits, for example `validation-000007`."""
    scans: tuple[int, ...]
    """The source scans, as rows of `sklearn.datasets.load_digits`, in the caption's order."""
    boxes: tuple[tuple[int, int, int], ...]
    """Left, top and side of each digit, in pixels, in the caption's order."""
    label: str
    """The digit's name if the scene has just one, else an empty string."""


def _phrase(colour: str, digit: str, place: str) -> str:
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {digit} at the {place}"


def digit_prompts(digit: str) -> list[str]:
    """Return the captions of all one-digit scenes of `digit`: its zero-shot prompt ensemble."""
    return [_phrase(colour, digit, place) for colour in COLOURS for place in PLACES]


@cache
def _scans() -> tuple[list[Image.Image], np.ndarray, dict[str, np.ndarray]]:
    """Return the scans as 8-bit pictures, their digits, and the rows of each split."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    pixels = np.clip(digits.images * (255 / 16), 0, 255).astype(np.uint8)
    hashes = [hashlib.sha256(scan.tobytes()).digest() for scan in pixels]
    shares = np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in hashes])
    rows = {
        "train": np.flatnonzero(shares >= VALIDATION_SHARE),
        "validation": np.flatnonzero(shares < VALIDATION_SHARE),
    }
    return [Image.fromarray(scan) for scan in pixels], digits.target, rows


def scan_rows(split: str) -> np.ndarray:
    """Return the rows of `load_digits` that scenes of `split` may show."""
    one_of("split", split, SPLITS)
    return _scans()[2][split]


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Return a muted colour gradient `[64, 64, 3]`, float32 in 15..95: dark, never black."""
    middle = rng.uniform(35, 75, 3).astype(np.float32)
    across, down = rng.uniform(-10, 10, (2, 3)).astype(np.float32)
    steps = np.linspace(-1, 1, SIZE, dtype=np.float32)
    return middle + steps[None, :, None] * across + steps[:, None, None] * down


def phrasings(caption: str) -> tuple[str, ...]:
    """Return a scene's caption with its phrases in every cyclic order, its own first."""
    phrases = caption.split(", ")
    return tuple(", ".join(phrases[n:] + phrases[:n]) for n in range(len(phrases)))


def scene(split: str, index: int, seed: int = 0) -> Scene:
    """Draw scene number `index` of a split: a pure function of its arguments."""
    rows = scan_rows(split)
    pictures, digits, _ = _scans()
    rng = np.random.default_rng((seed, SPLITS.index(split), index))
    canvas = _ground(rng)
    count = 1 + int(np.searchsorted(CUMULATIVE, rng.random(), side="right"))
    places = rng.permutation(len(PLACES))[:count]
    colours = rng.permutation(len(COLOURS))[:count]
    sides = rng.integers(MIN_SIDE, MAX_SIDE + 1, count)
    strays = rng.integers(-2, 3, (count, 2))
    scans = rows[rng.integers(0, len(rows), count)]
    phrases, boxes = [], []
    for scan, place, colour, side, stray in zip(scans, places, colours, sides, strays):
        colour_name, rgb = _COLOURS[colour]
        place_name, centre = _PLACES[place]
        corner = np.asarray(centre) + stray - side // 2
        left, top = corner.clip(0, SIZE - side).tolist()
        ink = pictures[scan].resize((int(side), int(side)), Image.Resampling.BICUBIC)
        alpha = np.asarray(ink, np.float32)[:, :, None] / 255
        patch = canvas[top : top + side, left : left + side]
        patch += alpha * (rgb - patch)
        boxes.append((left, top, int(side)))
        phrases.append(_phrase(colour_name, DIGITS[digits[scan]], place_name))
    return Scene(
        image=Image.fromarray(np.rint(canvas).astype(np.uint8)),
        caption=", ".join(phrases),
        key=f"{split}-{index:06d}" + (f"-{seed}" if seed else ""),
        scans=tuple(int(scan) for scan in scans),
        boxes=tuple(boxes),
        label=DIGITS[digits[scans[0]]] if count == 1 else "",
    )


def scene_of(key: str) -> Scene:
    """Draw the scene of a key, as `Scene.key` gives it."""
    parts = re.fullmatch(r"([a-z]+)-(\d{6,9})(?:-(\d{1,18}))?", key)
    if parts is None:
        raise UserError(f"{key} is no scene: keys look like validation-000007")
    split, index, seed = parts.groups("0")
    return scene(split, int(index), int(seed))
