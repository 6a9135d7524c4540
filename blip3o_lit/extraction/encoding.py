"""Both towers over one batch: pictures in, the arrays of a token store out.

Shape suffixes: B images, N tokens, C token width, P projection width, S side of the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import ArraySpec
from blip3o_lit.tokens.views import GRID_64, average
from blip3o_lit.towers.tower import Tower

TEXT = "text"
"""Name of the caption embeddings' array."""
STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class TowerSet:
    """The towers of one extraction and what becomes of their tokens."""

    def __init__(
        self,
        towers: Mapping[str, Tower],
        captions: bool,
        storage: str = "float16",
        store: str = "full",
        device: str = "cpu",
        compile: bool = False,
        pixels: Mapping[str, Any] | None = None,
    ) -> None:
        """Move the towers to the device and describe the arrays.

        Args:
            towers: By array name, condition first; the last one encodes captions if it can.
            captions: Whether the source has captions.
            storage: float16, bfloat16 or float32.
            store: full, or grid_64 for 8x8 averages of projected tokens.
            device: Where the towers run.
            compile: Compile each tower's token function.
            pixels: What of `pixels.*` is not the default, for the index.

        Raises:
            UserError: If `store=grid_64` and a tower has no projection or no grid that divides.
        """
        self.towers = {name: tower.to(device) for name, tower in towers.items()}
        self.pixels = dict(pixels or {})
        self.device, self.storage, self.store = torch.device(device), storage, store
        self._tokens = {
            name: torch.compile(tower.tokens) if compile else tower.tokens
            for name, tower in self.towers.items()
        }
        self._heads = (
            {name: self._head(name, tower) for name, tower in self.towers.items()}
            if store == "grid_64"
            else {}
        )
        self.arrays = {name: self._spec(name, tower) for name, tower in self.towers.items()}
        self._speaker = self.target if captions else None
        if self._speaker is not None:
            probe_1P = self._speaker.encode_text([""])
            if probe_1P is None:
                self._speaker = None
            else:
                name = self._speaker.info.name
                self.arrays[TEXT] = ArraySpec("text", storage, (probe_1P.shape[1],), tower=name)

    @property
    def target(self) -> Tower:
        """The tower whose text side counts: the last one."""
        return list(self.towers.values())[-1]

    def _head(self, name: str, tower: Tower) -> Head:
        tensors, metadata = tower.heads()
        rows, columns = tower.info.shape.grid
        if "projection" not in tensors:
            raise UserError(f"{tower.info.name} has no projection for store=grid_64: store=full")
        if rows % GRID_64[0] or columns % GRID_64[1]:
            raise UserError(
                f"{tower.info.name} has a {rows}x{columns} grid, which store=grid_64 can't average "
                "to 8x8: store=full"
            )
        norm = "none" if tower.info.normed else metadata.get("norm", "none")
        return Head(
            norm,
            float(metadata.get("eps", "1e-5")),
            tensors.get("norm.weight"),
            tensors.get("norm.bias"),
            tensors["projection"],
        ).to(self.device)

    def _spec(self, name: str, tower: Tower) -> ArraySpec:
        info, shape = tower.info, tower.info.shape
        compact = name in self._heads
        width = self._heads[name].width if compact else shape.width
        return ArraySpec(
            kind="tokens",
            dtype=self.storage,
            shape=(64, width) if compact else (shape.tokens, width),
            cls=shape.cls and not compact,
            grid=GRID_64 if compact else shape.grid,
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
        return members + 1536

    def prepare(self, image: Image.Image) -> dict[str, Tensor]:
        """Resize and normalise a decoded picture for each tower; runs in threads.

        Towers with equal preprocessing share one tensor.
        """
        done: list[tuple[dict, Tensor]] = []
        inputs = {}
        for name, tower in self.towers.items():
            facts = tower.info.preprocessing
            found = next((pixels for known, pixels in done if known and known == facts), None)
            if found is None:
                found = tower.preprocess(image)
                done.append((facts, found))
            inputs[name] = found
        return inputs

    @torch.inference_mode()
    def encode(self, inputs: list[dict[str, Tensor]], captions: list[str]) -> dict[str, Tensor]:
        """Run every tower once; returns `[B, N, C]` (and text `[B, P]`) on the CPU, as stored.

        On a GPU the copies back are under way when this returns: call `finish` before reading.

        Raises:
            UserError: If the GPU's memory does not hold the batch.
        """
        try:
            return self._encode(inputs, captions)
        except torch.OutOfMemoryError as error:
            smaller = max(len(inputs) // 2, 1)
            raise UserError(
                f"out of memory on {self.device} with extract.batch_size={len(inputs)}: "
                f"try extract.batch_size={smaller}"
            ) from error

    def _encode(self, inputs: list[dict[str, Tensor]], captions: list[str]) -> dict[str, Tensor]:
        dtype = STORED[self.storage]
        moved: dict[int, Tensor] = {}
        outputs = {}
        for name, tokens_of in self._tokens.items():
            pixels = [sample[name] for sample in inputs]
            if id(pixels[0]) not in moved:
                moved[id(pixels[0])] = self._to_device(torch.stack(pixels))
            tokens_BNC = tokens_of(moved[id(pixels[0])])
            if name in self._heads:
                grid_BNC = tokens_BNC[:, int(self.towers[name].info.shape.cls) :]
                rows, columns = self.towers[name].info.shape.grid
                pool = (rows // GRID_64[0], columns // GRID_64[1])
                tokens_BNC = average(self._heads[name](grid_BNC), GRID_64, pool)
            outputs[name] = self._to_host(tokens_BNC.to(dtype))
        if self._speaker is not None:
            text_BP = self._speaker.encode_text(captions)
            assert text_BP is not None
            outputs[TEXT] = self._to_host(text_BP.to(dtype))
        return outputs

    def _to_device(self, pixels_B3SS: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return pixels_B3SS.to(self.device)
        return pixels_B3SS.pin_memory().to(self.device, non_blocking=True)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type != "cuda":
            return tensor.cpu()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def mark(self) -> torch.cuda.Event | None:
        """Return an event after which the last `encode`'s arrays may be read (None on a CPU)."""
        if self.device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def heads(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the content of heads.safetensors: tensors and metadata, prefixed by array."""
        tensors, metadata = {}, {}
        for name, tower in self.towers.items():
            found, facts = tower.heads()
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
            metadata |= {f"{name}.{key}": value for key, value in facts.items()}
        return tensors, metadata


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a NumPy array; bfloat16, which NumPy lacks, becomes float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
