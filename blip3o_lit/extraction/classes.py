"""Class prompts, for zero-shot: read from a file, embedded by the target tower.

Shape suffixes: K classes, M prompts of a class, P embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from blip3o_lit.config.errors import UserError
from blip3o_lit.extraction.pipeline import cpu_lanes
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.towers.tower import Tower

TEMPLATE = "a photo of a {}."
"""Prompt of a class that comes without one (Radford et al. 2021, section 3.1.4)."""
BATCH = 64


def read_classes(file: Path) -> dict[str, list[str]]:
    """Return the prompts of each class.

    Args:
        file: A .json, `{"name": "prompt" or ["prompt", ...]}` or `["name", ...]`; or a text file
            with a name a line. Names without prompts get `TEMPLATE`.

    Raises:
        UserError: If it is missing, or fewer than two different classes are in it.
    """
    try:
        text = file.read_text("utf-8-sig")
        data: Any = json.loads(text) if file.suffix.lower() == ".json" else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"classes={file} can't be read: {str(error).splitlines()[0]}") from error
    if isinstance(data, list):
        data = {str(name).strip(): [] for name in data if str(name).strip()}
    if not isinstance(data, dict) or len(data) < 2:
        raise UserError(f"classes={file} must name two classes or more")
    classes = {}
    for name, prompts in data.items():
        listed = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
            raise UserError(f"classes={file}: the prompts of {name} are no text or list of texts")
        classes[name] = listed or [TEMPLATE.format(name)]
    return classes


def embed_classes(tower: Tower, classes: dict[str, list[str]]) -> Classes | None:
    """Embed each class as the mean of its prompts' unit vectors; None without a text side."""
    prompts = [prompt for listed in classes.values() for prompt in listed]
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    lanes, threads = cpu_lanes(tower.device)

    def start() -> None:
        if tower.device.type == "cpu":
            torch.set_num_threads(threads)

    with ThreadPoolExecutor(lanes, initializer=start) as pool:
        found = list(pool.map(tower.encode_text, batches))
    embedded = [text_BP.cpu() for text_BP in found if text_BP is not None]
    if not embedded:
        return None
    rows = torch.cat(embedded).double().split([len(listed) for listed in classes.values()])
    return Classes(list(classes), torch.stack(list(_means(rows))).float(), tower.info.name)


def _means(rows: tuple[Tensor, ...]) -> Iterator[Tensor]:
    for text_MP in rows:
        yield F.normalize(F.normalize(text_MP, dim=-1).mean(0), dim=-1)
