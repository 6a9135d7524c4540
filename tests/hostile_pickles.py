"""Seeds of pickle fuzzing and what a reader may answer to their mutations."""

from __future__ import annotations

import contextlib
import pickle
from pathlib import Path
from typing import Any

import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.embeddings import LegacyFile


def embeddings(samples: int = 5, tokens: int = 256, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(samples)
    data = {
        "clip_blip3o_embeddings": torch.randn(samples, tokens, 3, generator=generator),
        "eva_blip3o_embeddings": torch.randn(samples, tokens, 4, generator=generator),
        "captions": [f"caption {i}" for i in range(samples)],
        "keys": [f"{i:06d}" for i in range(samples)],
        "total_samples": samples,
        "config": {"clip_model": "a", "eva_model": "b", "tokens": tokens, "extraction_time": 1.5},
    }
    return {**data, **more}


SEEDS = [pickle.dumps(embeddings(2, 64), protocol=p) for p in (0, 2, 4, 5)] + [
    pickle.dumps(
        {k: v.numpy() if torch.is_tensor(v) else v for k, v in embeddings(2, 64).items()},
        protocol=p,
    )
    for p in (2, 5)
]


def check_only_user_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        file = LegacyFile(path)
        for side in file.sides.values():
            assert side.rows(0, len(side)).shape[0] == file.samples
