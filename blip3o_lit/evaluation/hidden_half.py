"""What drawn samples of `data=demo_masked` show in the half that the condition tower never saw.

Shape suffixes: K samples, B images, P places, H and W pixels.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from blip3o_lit.drawing.digits import HIDDEN, DigitReader, accuracy, places_of, shares
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.towers import scenes


class HiddenHalf:
    """Reads drawn scenes, by estimator; `true` are the drawn true tokens."""

    def __init__(self, reader: DigitReader) -> None:
        self.reader = reader
        self._labels: dict[str, list[Tensor]] = {}
        self._true_BP: list[Tensor] = []
        self._distinct: list[Tensor] = []
        self._draws = 0

    def add(self, name: str, pictures_B3HW: Tensor) -> None:
        self._labels.setdefault(name, []).append(self.reader.read(pictures_B3HW))

    def add_captions(self, captions: list[str]) -> None:
        """Say what the scenes of a batch show in truth."""
        self._true_BP += [places_of(caption) for caption in captions]

    def add_draws(self, pictures_KB3HW: Tensor) -> None:
        """Count the different hidden halves among the samples of each condition."""
        labels_KBP = torch.stack([self.reader.read(part) for part in pictures_KB3HW])
        self._draws = len(labels_KBP)
        self._distinct.append(_distinct(labels_KBP))

    def result(self) -> dict[str, Any]:
        labels = {name: torch.cat(parts) for name, parts in self._labels.items()}
        out: dict[str, Any] = {
            "places": list(HIDDEN),
            "shares": {name: shares(labels_BP) for name, labels_BP in labels.items()},
            "reader_on_true_tokens": accuracy(labels["true"], torch.stack(self._true_BP)),
        }
        if self._distinct:
            distinct_B = torch.cat(self._distinct)
            out["draws"] = {
                "samples": self._draws,
                "images": len(distinct_B),
                "different_halves": float(distinct_B.double().mean()),
            }
            whole = len(labels["true"]) // self._draws * self._draws
            if whole:
                groups = labels["true"][:whole].unflatten(0, (self._draws, -1))
                other = float(_distinct(groups).double().mean())
                out["draws"]["different_halves_of_as_many_true_images"] = other
        return out


def shows_scenes(reader: TokenReader) -> bool:
    """Return whether a store's images are demo scenes."""
    first = reader.metadata(np.arange(1))[0]
    return str(first.get("source", "")).startswith("scene:")


def _distinct(labels_KBP: Tensor) -> Tensor:
    """Return how many different hidden halves each image's samples show `[B]`."""
    names = list(scenes.PLACES)
    hidden_KBP = labels_KBP[..., [names.index(place) for place in HIDDEN]]
    counts = [len(torch.unique(image_KP, dim=0)) for image_KP in hidden_KBP.unbind(1)]
    return torch.tensor(counts)
