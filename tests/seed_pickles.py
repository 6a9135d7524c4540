"""Embeddings as the seeds pickled them."""

from __future__ import annotations

from typing import Any

import torch


def embeddings(samples: int, tokens: int, seed: int = 0, widths: tuple[int, int] = (4, 3)) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return {
        "eva_blip3o_embeddings": torch.randn(samples, tokens, widths[0], generator=generator),
        "clip_blip3o_embeddings": torch.randn(samples, tokens, widths[1], generator=generator),
        "captions": [f"caption {seed}.{i}" for i in range(samples)],
        "keys": [f"{seed:02d}{i:04d}" for i in range(samples)],
        "total_samples": samples,
        "config": {"clip_model": "openai/clip-vit-large-patch14", "eva_model": "BAAI/EVA-CLIP-8B"},
    }
