"""int8 tokens and their scales.

They are q * channel scale (`scale="channel"`) or q * channel scale * token scale (`scale="token"`,
one number per token, stored beside the tokens as `<array>_scale`). Channel scales come from a first
pass over some samples, CLS and patches apart, and lie in `scales.safetensors`.

Shape suffixes: S samples of the first pass, B samples, N tokens, R tokens of a piece, C channels,
K scale rows (CLS where there is one, then patches).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from blip3o_lit.base.files import replacing
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import ArraySpec

SCALES_FILE = "scales.safetensors"
LEVELS = 127
CHUNK = 16
SERIAL = 1 << 15
"""Numbers up to which torch takes one thread for an elementwise operation."""


def scale_array(name: str) -> str:
    """Return the name of the array that holds an array's token scales."""
    return f"{name}_scale"


def quantise(
    value: np.ndarray, scale_NC: np.ndarray, by_token: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return int8 tokens (any leading axes) and, by token, their token scales in fp32."""
    scaled = value.astype(np.float32) / scale_NC
    if not by_token:
        return np.rint(scaled).clip(-LEVELS, LEVELS).astype(np.int8), None
    token = np.maximum(np.abs(scaled).max(-1) / LEVELS, np.float32(1e-12)).astype(np.float32)
    return np.rint(scaled / token[..., None]).astype(np.int8), token


def dequantise(stored_BNC: Tensor, scale_NC: Tensor, token_BN: Tensor | None) -> Tensor:
    """Return the tokens in fp16, as fp16 stores give them, on the device of what is stored.

    On a CPU a few tokens at a time go through one fp32 buffer, which stays in the cache
    (docs/performance.md). The pieces are too small for torch to share out to threads.
    """
    out = torch.empty_like(stored_BNC, dtype=torch.float16)
    if stored_BNC.device.type != "cpu":
        if token_BN is None:
            return torch.mul(stored_BNC, scale_NC, out=out)
        return torch.mul(stored_BNC * scale_NC, token_BN[..., None], out=out)
    rows = max(1, SERIAL // stored_BNC.shape[2])
    for start in range(0, stored_BNC.shape[1], rows):
        part = slice(start, start + rows)
        scale_RC = scale_NC[part]
        buffer_RC = torch.empty(scale_RC.shape)
        for i, stored_NC in enumerate(stored_BNC):
            buffer_RC.copy_(stored_NC[part]).mul_(scale_RC)
            if token_BN is not None:
                buffer_RC.mul_(token_BN[i, part, None])
            out[i, part] = buffer_RC
    return out


def spread(scale_KC: np.ndarray, spec: ArraySpec) -> np.ndarray:
    """Return channel scales `[N, C]`."""
    counts = [1, spec.token_shape.patches] if spec.cls else [spec.token_shape.patches]
    return np.repeat(scale_KC, counts, axis=0)


def scale_hash(scale_KC: np.ndarray) -> str:
    """Return the checksum that ties an index to its channel scales."""
    return hashlib.sha256(scale_KC.astype("<f4").tobytes()).hexdigest()[:32]


def fit_int8(spec: ArraySpec, samples_SNC: np.ndarray) -> tuple[ArraySpec, np.ndarray]:
    """Choose how an array is stored in int8: return its spec and the channel scales `[K, C]`.

    `channel` spreads 127 levels over the largest magnitude that the first pass saw in a channel
    (larger ones are cut off later); `token` divides by the channels' rms, then spreads the levels
    over each token's largest value. The higher mean cosine to the true tokens wins.
    """
    samples_SNC = samples_SNC.astype(np.float32, copy=False)
    rows = [samples_SNC[:, :1], samples_SNC[:, 1:]] if spec.cls else [samples_SNC]
    largest = [np.maximum(part.max((0, 1)), -part.min((0, 1))) for part in rows]
    by_channel = np.stack(largest) / LEVELS
    by_token = np.stack([_rms(part) for part in rows])
    choices: list[tuple[float, str, np.ndarray]] = []
    for kind, raw_KC in (("channel", by_channel), ("token", by_token)):
        scale_KC = np.maximum(raw_KC, max(1e-6 * raw_KC.max(), 1e-12)).astype(np.float32)
        mean = _cosine(samples_SNC, spread(scale_KC, spec), kind == "token")
        choices.append((mean, kind, scale_KC))
    mean, kind, scale_KC = max(choices, key=lambda choice: choice[0])
    int8 = replace(spec, dtype="int8", scale=kind, cosine=mean, scale_hash=scale_hash(scale_KC))
    return int8, scale_KC


def _rms(samples_SNC: np.ndarray) -> np.ndarray:
    """Return each channel's root mean square, one sample at a time to spare memory."""
    squares = sum(np.square(tokens, dtype=np.float64).mean(0) for tokens in samples_SNC)
    return np.sqrt(squares / len(samples_SNC))


def _cosine(samples_SNC: np.ndarray, scale_NC: np.ndarray, by_token: bool) -> float:
    total, scales = 0.0, torch.from_numpy(scale_NC)
    for start in range(0, len(samples_SNC), CHUNK):
        true = samples_SNC[start : start + CHUNK]
        stored, token_SN = quantise(true, scale_NC, by_token)
        tokens = None if token_SN is None else torch.from_numpy(token_SN)
        back = dequantise(torch.from_numpy(stored), scales, tokens).double()
        total += float(torch.cosine_similarity(back, torch.from_numpy(true).double(), -1).sum())
    return total / (samples_SNC.shape[0] * samples_SNC.shape[1])


def with_token_scales(specs: dict[str, ArraySpec]) -> dict[str, ArraySpec]:
    """Add the arrays of token scales that int8 arrays need, after all others."""
    extra = {
        scale_array(name): ArraySpec("scale", "float32", spec.shape[:1])
        for name, spec in specs.items()
        if spec.scale == "token"
    }
    return {name: spec for name, spec in specs.items() if spec.kind != "scale"} | extra


def save_scales(folder: Path, scales: dict[str, np.ndarray]) -> None:
    """Write the channel scales `[K, C]` of all int8 arrays."""
    content = {name: scales[name].astype(np.float32) for name in sorted(scales)}
    with replacing(folder / SCALES_FILE) as temporary:
        save_file(content, temporary)


def load_scales(folder: Path, specs: dict[str, ArraySpec]) -> dict[str, np.ndarray]:
    """Return the channel scales `[N, C]` of a store's int8 arrays; empty without such arrays."""
    int8 = {name: spec for name, spec in specs.items() if spec.dtype == "int8"}
    if not int8:
        return {}
    file = folder / SCALES_FILE
    try:
        scales = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged: int8 tokens need it, restore it") from error
    for name, spec in int8.items():
        if name not in scales or scale_hash(scales[name]) != spec.scale_hash:
            raise UserError(f"{file} holds no or other scales for {name}: restore it")
    return {name: spread(scales[name], spec) for name, spec in int8.items()}
