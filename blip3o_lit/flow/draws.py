"""Noise and uniform numbers as pure functions of (seed, stream, sample id, epoch).

Each sample draws from its own stream of numbers, so what it gets does not depend on the rank, the
batch composition or the order, and a resumed run draws what the undisturbed one would have. CPU
and CUDA generators differ: the same sample has other noise on another kind of device.

Keep `sample_B` and `epoch_B`, int64, on the CPU: the seeds are mixed there, and reading them back
from an accelerator would make it wait. Where one sample is drawn several times, `epoch_B` numbers
the draws.

Shapes: B batch, N tokens, D target width.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor


class Stream(IntEnum):
    """Independent purposes of random numbers; a new purpose takes a new number."""

    TRAINING_NOISE = 1
    TRAINING_TIMES = 2
    EVALUATION_NOISE = 3
    FITTING_NOISE = 4
    CAPTION = 5


CUDA_PIECE = 1 << 17
"""Numbers that one CUDA kernel draws: of more than its threads, which the card's multiprocessors
limit, the order would depend on the card. 64 of 2,048 threads have so many."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    """Mix 64-bit words: the finaliser of splitmix64 (Steele, Lea and Flood 2014), a bijection."""
    with np.errstate(over="ignore"):
        value = value + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


def sample_seeds(seed: int, stream: Stream, sample_B: Tensor, epoch_B: Tensor) -> np.ndarray:
    """Return a seed per sample, uint64 [B]."""
    word = _mix(np.full(len(sample_B), seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64))
    word = _mix(word ^ np.uint64(stream))
    word = _mix(word ^ _words(sample_B))
    return _mix(word ^ _words(epoch_B))


def noise(
    seed: int,
    stream: Stream,
    sample_B: Tensor,
    epoch_B: Tensor,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return standard normal numbers [B, *shape] in float32, a function of each sample alone."""
    generator = torch.Generator(device)
    size = math.prod(shape)
    piece = min(size, CUDA_PIECE) if generator.device.type == "cuda" else size
    out = torch.empty(len(sample_B), *shape, dtype=torch.float32, device=device)
    for row, word in zip(out, sample_seeds(seed, stream, sample_B, epoch_B)):
        generator.manual_seed(int(word))
        for numbers in row.view(-1).split(piece):
            numbers.normal_(generator=generator)
    return out


def uniforms(
    seed: int, stream: Stream, sample_B: Tensor, epoch_B: Tensor, count: int = 1
) -> Tensor:
    """Return float32 [B, count] on the CPU, uniform on the open interval (0, 1).

    They are (k + 1/2) / 2^23, which float32 holds exactly, so neither 0 nor 1 occurs.
    """
    words_B1 = sample_seeds(seed, stream, sample_B, epoch_B)[:, None]
    with np.errstate(over="ignore"):
        words_BC = _mix(words_B1 + np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN)
    cells_BC = (words_BC >> np.uint64(41)).astype(np.float64)
    return torch.from_numpy(((cells_BC + 0.5) / 2**23).astype(np.float32))


def _words(ids_B: Tensor) -> np.ndarray:
    return ids_B.detach().cpu().numpy().astype(np.int64).view(np.uint64)
