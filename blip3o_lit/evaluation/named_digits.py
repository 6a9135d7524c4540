"""Whether drawn scenes show what their captions name: digits, colours and places found again.

Beside every estimator stand the drawn true tokens, which are the most that can be reached, and the
same pictures read against the captions of others, which is what chance finds.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blip3o_lit.drawing.scene_reader import FLAGS, SceneReader


class NamedDigits:
    """Reads drawn scenes beside their captions, by estimator; `true` are the drawn true tokens."""

    def __init__(self, reader: SceneReader) -> None:
        self.reader = reader
        self._found: dict[str, list[dict[str, Tensor]]] = {}
        self._swapped: dict[str, list[dict[str, Tensor]]] = {}
        self._empty: dict[str, list[Tensor]] = {}

    def add(self, name: str, pictures_B3HW: Tensor, captions: Sequence[str]) -> None:
        """Add pictures in 0..1 that are to show their captions, in the same order."""
        reading = self.reader.read(pictures_B3HW)
        self._found.setdefault(name, []).append(reading.found(captions))
        self._empty.setdefault(name, []).append(reading.empty(captions))
        if len(captions) > 1:
            others = [*captions[1:], captions[0]]
            self._swapped.setdefault(name, []).append(reading.found(others))

    def scores(self, name: str) -> dict[str, float]:
        """Return the shares of one estimator, `named_digit` and so on; nothing if it has none."""
        if name not in self._found:
            return {}
        shares = _shares(_joined(self._found[name]))
        return {f"named_{key}": shares[key] for key in FLAGS if key in shares}

    def result(self) -> dict[str, Any]:
        """Return shares by estimator: of all named digits, of one-digit scenes, and of chance."""
        out: dict[str, Any] = {"captions": 0, "shares": {}, "one_digit": {}, "swapped": {}}
        for name, parts in self._found.items():
            found = _joined(parts)
            empty_B = torch.cat(self._empty[name])
            out["captions"] = len(empty_B)
            out["shares"][name] = {**_shares(found), "empty": float(empty_B.mean())}
            alone = {key: flags[found["alone"]] for key, flags in found.items()}
            out["one_digit"][name] = _shares(alone)
            if name in self._swapped:
                out["swapped"][name] = _shares(_joined(self._swapped[name]))
        return out


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _shares(found: dict[str, Tensor]) -> dict[str, float]:
    """Return how often each flag holds, and of how many digits; nothing where there is none."""
    count = len(found["alone"])
    if not count:
        return {}
    return {"digits": count, **{key: float(found[key].double().mean()) for key in FLAGS}}
