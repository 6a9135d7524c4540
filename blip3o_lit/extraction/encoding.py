"""All towers over one batch: pictures and captions in, the arrays of a token store out.

Shape suffixes: B images, N tokens, C token width, P projection width, S side of the input,
K captions of a picture, T words of all captions, E width of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.drawing import thumbnail
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ArraySpec, lengths_array
from blip3o_lit.tokens.store.sequences import sequence_specs
from blip3o_lit.tokens.store.storage import TORCH_TYPES
from blip3o_lit.tokens.views import GRID_64, View
from blip3o_lit.towers.text_tower import TextTower
from blip3o_lit.towers.tower import Tower

TEXT, WORDS = "text", "words"
"""Names of the arrays of caption embeddings, and of the states of captions' words."""


class TowerSet:
    """The towers of one extraction, by array name, and what becomes of their tokens.

    The condition comes first; the last tower, the target, encodes captions if it can. `pixels` are
    the changed settings of `pixels.*`, for the index.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        captions: bool,
        storage: str = "float16",
        store: str = "full",
        device: str = "cpu",
        compile: bool = False,
        pixels: Mapping[str, Any] | None = None,
        thumbnails: bool = False,
        words: TextTower | None = None,
        most_captions: int = 1,
    ) -> None:
        self.towers = {name: tower.to(device) for name, tower in towers.items()}
        self.target = list(self.towers.values())[-1]
        self.device, self.storage = torch.device(device), storage
        self.pixels, self.thumbnails = dict(pixels or {}), thumbnails
        self._tokens = {name: tower.tokens for name, tower in self.towers.items()}
        if compile:
            self.compile()
        self._inputs = {name: self._input(name) for name in self.towers}
        self._views: dict[str, View] = {}
        if store == "grid_64":
            self._views = {name: self._view(tower) for name, tower in self.towers.items()}
        self.arrays = {name: self._spec(name, tower) for name, tower in self.towers.items()}
        text_1P = self.target.encode_text([""]) if captions else None
        self._speaks = text_1P is not None
        if text_1P is not None:
            name = self.target.info.name
            self.arrays[TEXT] = ArraySpec("text", storage, (text_1P.shape[1],), tower=name)
        self.words = None if words is None or not captions else words.to(device)
        self.most_captions = most_captions
        if self.words is not None:
            info = self.words.info
            sizes = (info.longest, info.width, most_captions)
            self.arrays |= sequence_specs(WORDS, *sizes, storage, info.name)
            self.arrays[WORDS] = replace(self.arrays[WORDS], preprocessing=info.source)

    def _input(self, name: str) -> str:
        """Return the first tower whose input serves this one too: that of equal preprocessing."""
        facts = self.towers[name].info.preprocessing
        same = [other for other, t in self.towers.items() if t.info.preprocessing == facts]
        return same[0] if facts else name

    def _view(self, tower: Tower) -> View:
        """Return the 8x8 averages of a tower's projected tokens."""
        info, (tensors, facts) = tower.info, tower.heads()
        rows, columns = info.shape.grid
        if "projection" not in tensors:
            raise UserError(f"{info.name} has no projection for store=grid_64: store=full")
        if rows % GRID_64[0] or columns % GRID_64[1]:
            raise UserError(
                f"{info.name} has a {rows}x{columns} grid, which store=grid_64 can't average "
                "to 8x8: store=full"
            )
        head = Head(tensors, facts, info.normed).to(self.device)
        pool = (rows // GRID_64[0], columns // GRID_64[1])
        return View(TokenShape(GRID_64, False, head.width), int(info.shape.cls), pool, head)

    def _spec(self, name: str, tower: Tower) -> ArraySpec:
        info, compact = tower.info, name in self._views
        shape = self._views[name].shape if compact else info.shape
        return ArraySpec(
            kind="tokens",
            dtype=self.storage,
            shape=(shape.tokens, shape.width),
            cls=shape.cls,
            grid=shape.grid,
            tower=info.name,
            layer=info.layer,
            normed=info.normed or compact,
            projected=compact,
            preprocessing={**info.preprocessing, **self.pixels},
        )

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample in a shard, headers and padding included."""
        members = sum(spec.nbytes + 128 + 512 + 256 for spec in self.arrays.values())
        if self.words is not None:
            members += (self.most_captions - 1) * self.arrays[WORDS].nbytes
        return members + 1536 + (thumbnail.BYTES + 512 if self.thumbnails else 0)

    def prepare(self, image: Image.Image) -> dict[str, Tensor]:
        """Resize and normalise a decoded picture for the towers; runs in threads."""
        return {name: self.towers[name].preprocess(image) for name in self._inputs.values()}

    def thumbnail(self, inputs: dict[str, Tensor]) -> bytes | None:
        """Return the JPEG of what the target tower sees of a picture; None where none is kept."""
        if not self.thumbnails:
            return None
        target = list(self.towers)[-1]
        return thumbnail.thumbnail(inputs[self._inputs[target]], self.target.info)

    @torch.inference_mode()
    def encode(
        self, inputs: list[dict[str, Tensor]], captions: Sequence[Sequence[str]]
    ) -> dict[str, Tensor]:
        """Run every tower once; returns `[B, N, C]` (and text `[B, P]`) on the CPU, as stored.

        The embedding is of each picture's first caption. Words are those of all captions, one
        after the other `[T, E]`, beside the length of each `[B, K]` int32.

        On a GPU the copies back are under way when this returns: wait for `mark` before reading.
        """
        try:
            return self._encode(inputs, captions)
        except torch.OutOfMemoryError as error:
            smaller = max(len(inputs) // 2, 1)
            raise UserError(
                f"out of memory on {self.device} with extract.batch_size={len(inputs)}: "
                f"try extract.batch_size={smaller}"
            ) from error

    def _encode(
        self, inputs: list[dict[str, Tensor]], captions: Sequence[Sequence[str]]
    ) -> dict[str, Tensor]:
        pixels = {
            name: self._to_device(torch.stack([sample[name] for sample in inputs]))
            for name in inputs[0]
        }
        outputs = {name: self._to_host(x_BNC) for name, x_BNC in self.tokens_of(pixels).items()}
        if self._speaks:
            text_BP = self.target.encode_text([first(own) for own in captions])
            assert text_BP is not None
            outputs[TEXT] = self._to_host(text_BP)
        if self.words is not None:
            outputs |= self._words_of(self.words, captions)
        return outputs

    def _words_of(self, tower: TextTower, captions: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        kept = [[text for text in own if text][: self.most_captions] for own in captions]
        states = tower.states([text for own in kept for text in own])
        lengths_BK = torch.zeros(len(kept), self.most_captions, dtype=torch.int32)
        counts = iter(len(state) for state in states)
        for row, own in enumerate(kept):
            for number in range(len(own)):
                lengths_BK[row, number] = next(counts)
        empty = torch.empty(0, tower.info.width)
        words_TE = self._to_host(torch.cat(states) if states else empty)
        return {WORDS: words_TE, lengths_array(WORDS): lengths_BK}

    def tokens_of(self, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Run every tower once on inputs `[B, 3, S, S]`; returns `[B, N, C]` on their device."""
        outputs = {}
        for name, tokens_of in self._tokens.items():
            tokens_BNC = tokens_of(pixels[self._inputs[name]])
            if name in self._views:
                view = self._views[name]
                tokens_BNC = view.compute(tokens_BNC[:, view.first :])
            outputs[name] = tokens_BNC
        return outputs

    def compile(self) -> None:
        """Run the towers through torch.compile from now on."""
        self._tokens = {name: torch.compile(tower.tokens) for name, tower in self.towers.items()}

    def move(self, device: torch.device) -> None:
        self.towers = {name: tower.to(device) for name, tower in self.towers.items()}
        self.words = None if self.words is None else self.words.to(device)
        self.device = device

    def _to_device(self, pixels_B3SS: Tensor) -> Tensor:
        if self.device.type == "cuda":
            pixels_B3SS = pixels_B3SS.pin_memory()
        return pixels_B3SS.to(self.device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(TORCH_TYPES[self.storage])
        if tensor.device.type != "cuda":
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """Return an event after which the last `encode`'s arrays may be read (None on a CPU)."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        # This device's stream: a pool's thread has device 0 as its current one.
        event.record(torch.cuda.current_stream(self.device))
        return event

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the content of heads.safetensors: tensors and metadata, prefixed by array."""
        tensors, metadata = {}, {}
        for name, tower in self.towers.items():
            own, facts = tower.heads()
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in own.items()}
            metadata |= {f"{name}.{key}": value for key, value in facts.items()}
        return tensors, metadata


def first(captions: Sequence[str]) -> str:
    """Return a picture's first caption, empty where it has none."""
    return next(iter(captions), "")


def samples_of(outputs: Mapping[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
    """Yield the arrays of each picture of `TowerSet.encode`'s batch."""
    rows = {name: array for name, array in outputs.items() if name != WORDS}
    samples = [dict(zip(rows, row)) for row in zip(*rows.values(), strict=True)]
    if WORDS in outputs:
        ends = outputs[lengths_array(WORDS)].sum(1).cumsum()
        for sample, words_TE in zip(samples, np.split(outputs[WORDS], ends[:-1]), strict=True):
            sample[WORDS] = words_TE
    yield from samples


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
