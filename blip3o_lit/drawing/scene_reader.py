"""Whether a drawn scene shows what its caption says: each named digit, its colour and its place.

Digits are read by `digits.py`; the colour of a place is the class of Gaussian colours (one
covariance for all: linear discriminant analysis) that its ink most likely has. Both are fitted on
training scenes alone, and what they find on drawn true tokens is the most that a drawing can reach.

Shape suffixes: B pictures, P places, K colours, F features, S side of a window, H and W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.drawing.digits import (
    NOTHING,
    SCENES,
    SIDE,
    WINDOW,
    DigitReader,
    digit_reader,
    scenes_of,
)
from blip3o_lit.towers import scenes

COLOURS = tuple(scenes.COLOURS)
PLACES = tuple(scenes.PLACES)
REACH = 3.5
"""Standard deviation of the weight around a place's centre, in pixels of the ink map."""
FITTED = 1000
"""Training scenes that colours are fitted on."""


@dataclass(frozen=True)
class Named:
    """One digit of a caption."""

    digit: int
    colour: int
    place: int


def named_in(caption: str) -> list[Named]:
    """Return the digits that a caption names; what is no phrase of scenes is passed over."""
    found = []
    for phrase in caption.split(", "):
        what, _, where = phrase.partition(" at the ")
        words = what.split()
        if len(words) < 2 or where not in PLACES:
            continue
        if words[-1] in scenes.DIGITS and words[-2] in COLOURS:
            digit, colour = scenes.DIGITS.index(words[-1]), COLOURS.index(words[-2])
            found.append(Named(digit, colour, PLACES.index(where)))
    return found


class ColourReader(nn.Module):
    """Reads the colour of ink at each of the nine places."""

    means_KF: Tensor
    precision_FF: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("means_KF", torch.zeros(len(COLOURS), 6))
        self.register_buffer("precision_FF", torch.eye(6))

    @torch.inference_mode()
    def read(self, pictures_B3HW: Tensor) -> Tensor:
        """Return the number of the likeliest colour of each place `[B, P]`, ink or not."""
        away = features(pictures_B3HW)[:, :, None] - self.means_KF
        distance_BPK = torch.einsum("bpkf,fg,bpkg->bpk", away, self.precision_FF, away)
        return distance_BPK.argmin(-1)

    def fit(self, pictures_B3HW: Tensor, captions: Sequence[str]) -> None:
        """Fit on scenes and their captions."""
        features_BPF = features(pictures_B3HW).double()
        digits = [(row, one) for row, text in enumerate(captions) for one in named_in(text)]
        rows = torch.stack([features_BPF[row, one.place] for row, one in digits])
        colours = torch.tensor([one.colour for _, one in digits])
        for colour in range(len(COLOURS)):
            self.means_KF[colour] = rows[colours == colour].mean(0)
        away = rows - self.means_KF.double()[colours]
        spread_FF = away.T @ away / len(away) + 1e-4 * torch.eye(away.shape[1], dtype=rows.dtype)
        self.precision_FF.copy_(torch.linalg.inv(spread_FF))


def features(pictures_B3HW: Tensor) -> Tensor:
    """Return the ink's mean colour at each place, and that with its brightness taken out."""
    small = F.adaptive_avg_pool2d(pictures_B3HW.float(), SIDE)
    edge = WINDOW // 2
    wide = F.pad(small, (edge,) * 4, mode="replicate")
    scale = SIDE / scenes.SIZE
    corners = [(int(x * scale), int(y * scale)) for x, y in scenes.PLACES.values()]
    windows = torch.stack([wide[..., y : y + WINDOW, x : x + WINDOW] for x, y in corners], 1)
    offset_S = torch.arange(WINDOW) - (WINDOW - 1) / 2
    near_S = torch.exp(-0.5 * (offset_S / REACH) ** 2).to(windows)
    ground = small.flatten(2).amax(1).median(1).values[:, None, None, None]
    bright = (windows.amax(2) - ground).clamp_min(0.02)
    weight = bright.square() * near_S * near_S[:, None]
    weight = weight / weight.sum((2, 3), keepdim=True)
    colour_BP3 = torch.einsum("bpcyx,bpyx->bpc", windows, weight)
    return torch.cat([colour_BP3, F.normalize(colour_BP3, dim=-1)], -1)


@dataclass(frozen=True)
class Reading:
    """What the nine places of pictures show."""

    digits_BP: Tensor
    """0 to 9, NOTHING or SPECKS."""
    colours_BP: Tensor

    def found(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Return what holds of each digit that the captions name, bool, one after the other.

        `digit`: the named digit stands at the named place; `colour`: what stands there has the
        named colour; `place`: something stands there; `all` three. `alone`: whether the caption
        names no other digit.
        """
        flags: dict[str, list[bool]] = {name: [] for name in (*FLAGS, "alone")}
        for row, caption in enumerate(captions):
            own = named_in(caption)
            for one in own:
                digit = int(self.digits_BP[row, one.place])
                place = digit != NOTHING
                colour = place and int(self.colours_BP[row, one.place]) == one.colour
                holds = (digit == one.digit, colour, place, digit == one.digit and colour)
                for name, value in zip(FLAGS, holds, strict=True):
                    flags[name].append(value)
                flags["alone"].append(len(own) == 1)
        return {name: torch.tensor(values, dtype=torch.bool) for name, values in flags.items()}

    def empty(self, captions: Sequence[str]) -> Tensor:
        """Return the share of the places that each caption leaves empty and that are so `[B]`."""
        shares = []
        for row, caption in enumerate(captions):
            left = torch.ones(len(PLACES), dtype=torch.bool)
            left[[one.place for one in named_in(caption)]] = False
            shares.append((self.digits_BP[row][left] == NOTHING).double().mean())
        return torch.stack(shares)


FLAGS = ("digit", "colour", "place", "all")
"""What is asked of each named digit."""


class SceneReader:
    """Reads whole scenes: digits and their colours, place by place."""

    def __init__(self, digits: DigitReader, colours: ColourReader) -> None:
        self.digits, self.colours = digits, colours

    def read(self, pictures_B3HW: Tensor) -> Reading:
        """Read pictures in 0..1 of any size."""
        return Reading(self.digits.read(pictures_B3HW), self.colours.read(pictures_B3HW))


def colour_reader(count: int = FITTED) -> ColourReader:
    """Return the reader of colours, fitted on the first training scenes: a closed form."""
    reader = ColourReader()
    captions = [scenes.scene("train", index).caption for index in range(count)]
    reader.fit(scenes_of("train", count)[0], captions)
    return reader


def scene_reader(folder: Path, scene_count: int = SCENES) -> SceneReader:
    """Return the reader of scenes; `folder` keeps the network that reads digits."""
    return SceneReader(digit_reader(folder, scene_count), colour_reader(min(FITTED, scene_count)))
