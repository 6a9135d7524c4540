"""What each number format costs: cosine to fp32 tokens and bytes a sample."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import result
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reader import TokenReader, TokenStore
from blip3o_lit.tokens.recode import recode
from blip3o_lit.tokens.shards import ArraySpec, TokenWriter

SAMPLES = 48
SPEC = ArraySpec("tokens", "float32", (257, 1024), cls=True, grid=(16, 16))
TARGETS = {"float16": 0.999999, "bfloat16": 0.99999, "int8": 0.9995}


def tokens(seed: int) -> np.ndarray:
    """Return heavy-tailed `[257, 1024]` tokens; as in CLIP, a few channels are 30 times wider."""
    rng = np.random.default_rng(seed)
    width = np.exp(np.random.default_rng(0).normal(0, 0.4, 1024))
    width[:6] *= 30
    out = rng.standard_t(6, (257, 1024)) * width + 0.5 * width
    out[0] *= 1.5
    return out.astype(np.float32)


def run() -> list[dict[str, Any]]:
    """Write tokens in fp32, recode them, and compare with what was written."""
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with TokenWriter(folder / "fp32", {"eva": SPEC, "clip": SPEC}) as writer:
            for number in range(SAMPLES):
                arrays = {"eva": tokens(number), "clip": tokens(number + SAMPLES)}
                writer.add("train", f"{number:06d}", arrays)
        store, ids = TokenStore.open(folder / "fp32"), np.arange(SAMPLES)
        mode = ModeConfig("cls_patch")
        true = TokenReader(store, "train", mode=mode).read(ids)["target"].double()
        for storage, target in TARGETS.items():
            index = recode(store, folder / storage, storage)
            reader = TokenReader(TokenStore.open(folder / storage), "train", mode=mode)
            stored = reader.read(ids)["target"].double()
            cosine = float(torch.cosine_similarity(stored, true, dim=-1).mean())
            size = sum(shard.bytes for shard in index.shards) / SAMPLES
            kind = index.arrays["clip"].scale or ""
            print(f"  {storage:<9} {kind:<8} cosine {cosine:.7f}  {size / 1e6:.3f} MB a sample")
            results.append(result(f"storage/{storage}_cosine", cosine, "", target))
    return results
