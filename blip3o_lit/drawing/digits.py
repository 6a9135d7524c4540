"""Which digits a drawn demo scene shows, place by place: a small network fitted on training scenes.

A place reads as a digit, as nothing, or as specks: ink in no digit's shape. Scenes have no specks;
those that the network learns from are digits whose patches were shuffled, dropped or mixed, and
averages of several: what generated tokens look like where they settle on no digit.

Shape suffixes: B pictures, P places, K classes, S side of a window, H and W pixels.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip3o_lit.models.fitted import load_or_fit
from blip3o_lit.towers import scenes

NOTHING, SPECKS = 10, 11
"""Classes beside the digits 0 to 9."""
SIDE, WINDOW = 32, 14
"""Sides of a scene and of a place's window, in pixels of the ink map: the largest digit, astray."""
PATCH = 2
"""Side of the patches that specks are made of: one token of the demo's."""
SCENES, EPOCHS, BATCH = 3000, 6, 128
RATE = 4e-3
"""Peak learning rate."""
NOISE = 0.02
"""On pixels in training: about a read-out's own error."""
VERSION = 1
"""Raised when the same scenes would give another network."""


HIDDEN = ("top right", "right", "bottom right")
"""Places that lie in the right half, which `data=demo_masked` hides from the condition tower."""


class DigitReader(nn.Module):
    """Reads the nine places of demo scenes."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, 64),
            nn.ReLU(),
            nn.Linear(64, SPECKS + 1),
        )

    @torch.inference_mode()
    def read(self, pictures_B3HW: Tensor) -> Tensor:
        """Return what each place of whole scenes shows, `[B, P]`: 0 to 9, NOTHING or SPECKS.

        Pictures are in 0..1 and of any size; places come in the order of `scenes.PLACES`.
        """
        windows = _windows(pictures_B3HW)
        parts = [self(part.flatten(0, 1)).argmax(1) for part in windows.split(64)]
        return torch.cat(parts).view(len(pictures_B3HW), len(scenes.PLACES))

    def forward(self, windows_B1SS: Tensor) -> Tensor:
        return self.layers(windows_B1SS)

    def fit(self, pictures_B3HW: Tensor, labels_BP: Tensor, batch_size: int = BATCH) -> None:
        """Train on scenes and what their places show, as `scenes_of` gives them."""
        self.train()
        windows = _windows(pictures_B3HW)
        rng = torch.Generator().manual_seed(0)
        digits, empty = windows[labels_BP != NOTHING], windows[labels_BP == NOTHING]
        named = labels_BP[labels_BP != NOTHING]
        few = len(digits) // 2
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=1e-2)
        steps = EPOCHS * ((len(digits) + 2 * few) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
        for _ in range(EPOCHS):
            grounds = empty[torch.randperm(len(empty), generator=rng)[:few]]
            inputs = torch.cat([digits, grounds, specks_of(digits, empty, few, rng)])
            classes = torch.cat([named, named.new_tensor([NOTHING, SPECKS]).repeat_interleave(few)])
            order = torch.randperm(len(inputs), generator=rng)
            for ids in order.split(batch_size)[: steps // EPOCHS]:
                noise = NOISE * torch.randn(inputs[ids].shape, generator=rng)
                loss = F.cross_entropy(self(inputs[ids] + noise), classes[ids])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()


def shares(labels_BP: Tensor, places: tuple[str, ...] = HIDDEN) -> dict[str, float]:
    """Return how often some places hold a readable digit, nothing, or specks; the sum is 1.

    A picture with specks at any of the places counts as specks, whatever else is there.
    """
    names = list(scenes.PLACES)
    chosen = labels_BP[:, [names.index(place) for place in places]]
    specks_B = (chosen == SPECKS).any(1)
    digit_B = (chosen < NOTHING).any(1) & ~specks_B
    specks, digit = (float(flags.double().mean()) for flags in (specks_B, digit_B))
    return {"digit": digit, "nothing": 1 - digit - specks, "specks": specks}


def accuracy(labels_BP: Tensor, true_BP: Tensor) -> dict[str, float]:
    """Return the share of true digits that are read right, and of empty places read as empty."""
    shown = true_BP != NOTHING
    right = (labels_BP == true_BP).double()
    return {"digit": float(right[shown].mean()), "nothing": float(right[~shown].mean())}


def scenes_of(split: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first scenes of a split, `[B, 3, 64, 64]` in 0..1, and their places `[B, P]`."""
    drawn = [scenes.scene(split, index) for index in range(count)]
    levels = np.stack([np.asarray(scene.image) for scene in drawn])
    pictures = torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255
    return pictures, torch.stack([places_of(scene.caption) for scene in drawn])


def places_of(caption: str) -> Tensor:
    """Return what each place of a scene shows, `[P]`, from its caption."""
    names = list(scenes.PLACES)
    labels_P = torch.full((len(names),), NOTHING)
    for phrase in caption.split(", "):
        what, _, where = phrase.partition(" at the ")
        labels_P[names.index(where)] = scenes.DIGITS.index(what.split()[-1])
    return labels_P


def _windows(pictures_B3HW: Tensor) -> Tensor:
    """Return the ink around each place, `[B, P, 1, S, S]`.

    Ink is the brightest channel: every digit is bright in one, and no ground is in any.
    """
    ink = F.adaptive_avg_pool2d(pictures_B3HW.float().amax(1, keepdim=True), SIDE)
    edge = WINDOW // 2
    wide = F.pad(ink, (edge,) * 4, mode="replicate")
    scale = SIDE / scenes.SIZE
    corners = [(int(x * scale), int(y * scale)) for x, y in scenes.PLACES.values()]
    return torch.stack([wide[:, :, y : y + WINDOW, x : x + WINDOW] for x, y in corners], 1)


def specks_of(digits_B1SS: Tensor, empty_B1SS: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Return windows `[B, 1, S, S]` of ink that is no digit, a quarter of each kind."""

    def some(windows: Tensor) -> Tensor:
        return windows[torch.randint(len(windows), (quarter,), generator=rng)]

    def cells(share: float) -> Tensor:
        side = WINDOW // PATCH
        drawn = torch.rand(quarter, 1, side, side, generator=rng) < share
        return drawn.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)

    quarter = -(-count // 4)
    patches = F.unfold(some(digits_B1SS), PATCH, stride=PATCH)
    shuffled = patches[..., torch.randperm(patches.shape[-1], generator=rng)]
    dropped = torch.where(cells(0.6), some(empty_B1SS), some(digits_B1SS))
    mixed = torch.where(cells(0.5), some(digits_B1SS), some(digits_B1SS))
    smeared = torch.stack([some(digits_B1SS) for _ in range(4)]).mean(0)
    kinds = (F.fold(shuffled, WINDOW, PATCH, stride=PATCH), dropped, mixed, smeared)
    return torch.cat(kinds)[:count]


def reader_file(folder: Path) -> Path:
    """Return where `folder` keeps the reader once it is fitted."""
    key = f"{VERSION}/{scenes.VERSION}/{SCENES}/{EPOCHS}/{BATCH}/{RATE}"
    return folder / f"digits-{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"


def digit_reader(folder: Path, scene_count: int = SCENES, batch_size: int = BATCH) -> DigitReader:
    """Return the reader, fitted on training scenes alone where `folder` does not hold it yet."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        reader = DigitReader()
    load_or_fit(
        reader,
        reader_file(folder),
        lambda: reader.fit(*scenes_of("train", scene_count), batch_size),
    )
    return reader.eval().requires_grad_(False)
