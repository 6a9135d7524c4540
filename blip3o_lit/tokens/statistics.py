"""Per-channel mean and standard deviation of tokens, and the scaling that uses them.

Networks train on standardised tokens: a few CLIP channels are far larger than the rest, and on raw
targets training hardly learns. Patches and CLS have statistics of their own; those of words are
over the tokens of all captions, never over padding.

Shape suffixes: B samples, N tokens, R rows (tokens of several samples), C channels.
"""

from __future__ import annotations

import hashlib
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip3o_lit.base.files import one_at_a_time, replacing
from blip3o_lit.base.first_rank import ALONE, FirstRank
from blip3o_lit.base.home import home
from blip3o_lit.base.progress import Work
from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.reading.ahead import fetched_ahead
from blip3o_lit.tokens.reading.loader import prefetch
from blip3o_lit.tokens.reading.mixture import MixedReader
from blip3o_lit.tokens.reading.packed import Batch
from blip3o_lit.tokens.reading.reader import TokenReader

READ_SAMPLES = 16
CHUNK_ROWS = 64
"""Rows converted to fp64 at a time: these stay in the cache."""
FLOOR = 1e-3
"""Channels whose std is below this share of the median std count as constant."""
VERSION = 3
"""Part of the cache key; raised when the same tokens would give other numbers."""


@dataclass(frozen=True)
class ChannelMoments:
    """Count, mean and sum of squared deviations of rows, per channel, in fp64."""

    count: float
    mean_C: Tensor
    m2_C: Tensor

    @classmethod
    def of(cls, rows_RC: Tensor) -> ChannelMoments:
        """Compute the moments of rows; sums are taken around the first chunk's mean."""
        chunks = rows_RC.split(CHUNK_ROWS)
        centre_C = chunks[0].double().mean(0)
        sum_C, squares_C = torch.zeros_like(centre_C), torch.zeros_like(centre_C)
        for chunk in chunks:
            shifted = chunk.double() - centre_C
            sum_C += shifted.sum(0)
            squares_C += shifted.square_().sum(0)
        count = len(rows_RC)
        return cls(count, centre_C + sum_C / count, squares_C - sum_C.square() / count)

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """Return the moments of both sets together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        delta_C = other.mean_C - self.mean_C
        mean_C = self.mean_C + delta_C * (other.count / count)
        m2_C = self.m2_C + other.m2_C + delta_C.square() * (self.count * other.count / count)
        return ChannelMoments(count, mean_C, m2_C)

    def scaled(self, factor: float) -> ChannelMoments:
        """Return the moments of rows that count `factor` times."""
        return ChannelMoments(self.count * factor, self.mean_C, self.m2_C * factor)

    @property
    def std_C(self) -> Tensor:
        """Standard deviation, never below `FLOOR` times the median channel's."""
        std_C = (self.m2_C / self.count).clamp_min(0).sqrt()
        return std_C.clamp_min(max(FLOOR * float(std_C.median()), 1e-6))


@dataclass(frozen=True)
class TokenMoments:
    """Moments of one side: patches, and CLS where there is one."""

    patch: ChannelMoments
    cls: ChannelMoments | None

    @classmethod
    def of(cls, tokens_BNC: Tensor, has_cls: bool) -> TokenMoments:
        first = ChannelMoments.of(tokens_BNC[:, 0]) if has_cls else None
        patches = tokens_BNC[:, 1:] if has_cls else tokens_BNC
        return cls(ChannelMoments.of(patches.reshape(-1, patches.shape[-1])), first)

    def merge(self, other: TokenMoments) -> TokenMoments:
        both = self.cls.merge(other.cls) if self.cls and other.cls else None
        return TokenMoments(self.patch.merge(other.patch), both)

    def scaled(self, factor: float) -> TokenMoments:
        return TokenMoments(self.patch.scaled(factor), self.cls and self.cls.scaled(factor))


class Standardizer(nn.Module):
    """Maps tokens to mean 0 and std 1 per channel, and back; always in fp32."""

    mean_NC: Tensor
    std_NC: Tensor

    def __init__(self, mean_NC: Tensor, std_NC: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean_NC", mean_NC.float().contiguous())
        self.register_buffer("std_NC", std_NC.float().contiguous())

    @classmethod
    def identity(cls, shape: TokenShape) -> Standardizer:
        """Return one that changes nothing; a state dict can be loaded into it."""
        size = (shape.tokens, shape.width)
        return cls(torch.zeros(size), torch.ones(size))

    @classmethod
    def of(cls, moments: TokenMoments, shape: TokenShape | None) -> Standardizer:
        """Spread the moments of patches and CLS over the positions of `shape`; words have one."""
        if shape is None:
            return cls(moments.patch.mean_C[None], moments.patch.std_C[None])
        parts = [(moments.cls, 1), (moments.patch, shape.patches)]
        means = [part.mean_C.expand(n, -1) for part, n in parts if part]
        stds = [part.std_C.expand(n, -1) for part, n in parts if part]
        return cls(torch.cat(means), torch.cat(stds))

    def standardise(self, x_BNC: Tensor) -> Tensor:
        """Return (x - mean) / std in fp32."""
        return torch.sub(x_BNC, self.mean_NC).float().div_(self.std_NC)

    def restore(self, x_BNC: Tensor) -> Tensor:
        """Return x * std + mean in fp32, the inverse of `standardise`."""
        return torch.addcmul(self.mean_NC, x_BNC.float(), self.std_NC)


Moments = dict[str, TokenMoments]
"""By side: `condition` (its grid), `target`, `words`; what a task has."""


def moments_of(batches: Iterable[Batch], shape: PairShape) -> Moments:
    """Stream over batches of grids, and of words `[R, E]` without padding.

    The result depends on the batches and their order alone.
    """
    totals: Moments = {}
    for batch in batches:
        for side, grid in _sides(shape).items():
            tokens = batch[side] if grid else batch[side][None]
            if tokens.shape[1]:
                _merge(totals, side, TokenMoments.of(tokens, grid is not None and grid.cls))
    return totals


def _merge(totals: Moments, side: str, moments: TokenMoments) -> None:
    """Add moments to those that a side has."""
    totals[side] = totals[side].merge(moments) if side in totals else moments


def _sides(shape: PairShape) -> dict[str, TokenShape | None]:
    """Return the sides of a task with their grids; words have none."""
    grids = {"condition": shape.condition, "target": shape.target}
    sides: dict[str, TokenShape | None] = {side: grid for side, grid in grids.items() if grid}
    return sides | ({"words": None} if shape.words else {})


def spread_ids(shard_sizes: np.ndarray, images: int) -> np.ndarray:
    """Return about `images` ids: whole shards, evenly spaced over the split, the last one cut."""
    count = min(len(shard_sizes), -(-images // max(1, int(shard_sizes.mean()))))
    chosen = np.linspace(0, len(shard_sizes) - 1, count).round().astype(int)
    bounds = np.append(0, np.cumsum(shard_sizes)).tolist()
    return np.concatenate([np.arange(bounds[i], bounds[i + 1]) for i in chosen])[:images]


def reader_batches(reader: TokenReader, images: int, threads: int) -> Iterator[Batch]:
    """Read the ids of `spread_ids` in small batches, ahead of their use; all captions of each."""
    ids = spread_ids(reader.shard_sizes, images)
    pieces = np.split(ids, range(READ_SAMPLES, len(ids), READ_SAMPLES))
    with Work("measuring channels", len(ids), "images") as work:
        for batch in prefetch(reader.read_all, fetched_ahead(reader, pieces, pieces), threads):
            yield batch
            work.advance(len(batch["target"]))


def mixture_moments(reader: MixedReader, images: int, threads: int) -> Moments:
    """Return the moments of an epoch of several stores, from a part of each store's images."""
    totals: Moments = {}
    for one, count in zip(reader.readers, reader.counts.tolist()):
        used = min(len(one), max(1, images * count // int(reader.counts.sum())))
        found = moments_of(reader_batches(one, used, threads), reader.shape)
        for side, moments in found.items():
            _merge(totals, side, moments.scaled(count / used))
    return totals


def _compute(file: Path, found: Moments, shape: PairShape) -> None:
    tensors: dict[str, Tensor] = {}
    for side, grid in _sides(shape).items():
        if side not in found:
            raise UserError(f"no image has {side}: choose another data.condition")
        standardizer = Standardizer.of(found[side], grid)
        tensors[f"{side}.mean"] = standardizer.mean_NC
        tensors[f"{side}.std"] = standardizer.std_NC
    with replacing(file) as temporary:
        save_file(tensors, temporary)


def cached_standardizers(
    content_hash: str,
    shape: PairShape,
    images: int,
    batches: Callable[[], Iterable[Batch]],
    ranks: FirstRank = ALONE,
) -> dict[str, Standardizer]:
    """Return the standardizers of condition, target and words, computing them once per content.

    `batches`, which covers `images` images, is called when nothing is cached, by the first rank.
    Ranks whose cache is another one are given the file.
    """
    return kept_standardizers(
        content_hash, shape, images, lambda: moments_of(batches(), shape), ranks
    )


def kept_standardizers(
    content_hash: str,
    shape: PairShape,
    images: int,
    moments: Callable[[], Moments],
    ranks: FirstRank = ALONE,
) -> dict[str, Standardizer]:
    """Return standardizers as `cached_standardizers` does, from moments of all sides."""
    name = hashlib.sha256(f"{content_hash}/{images}/{VERSION}".encode()).hexdigest()[:32]
    file = home() / "statistics" / f"{name}.safetensors"

    def computed() -> str:
        if not file.is_file():
            with one_at_a_time(file, required=False):  # of all processes of this machine one
                if not file.is_file():
                    _compute(file, moments(), shape)
        # Rows repeat: little is left of them.
        return "" if ranks.alone else b64encode(zlib.compress(file.read_bytes(), 1)).decode()

    packed = ranks.finds(computed)
    if not file.is_file():
        with replacing(file) as temporary:
            temporary.write_bytes(zlib.decompress(b64decode(packed)))
    try:
        saved = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged: delete it, it is computed again") from error
    return {s: Standardizer(saved[f"{s}.mean"], saved[f"{s}.std"]) for s in _sides(shape)}
