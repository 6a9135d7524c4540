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
from blip3o_lit.images.text import label_of, read_text, whole
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.towers.tower import Tower

TEMPLATE = "a photo of a {}."
"""Prompt of a class that comes without one (Radford et al. 2021, section 3.1.4)."""
BATCH = 64


def read_classes(file: Path) -> dict[str, list[str]]:
    """Return the prompts of each class.

    Args:
        file: A .json, `{"name": "prompt" or ["prompt", ...]}` or `["name", ...]`; or a text file
            with a name a line; empty lines don't count. Names without prompts get `TEMPLATE`.

    Raises:
        UserError: If it is missing, names a class twice, or fewer than two.
    """
    try:
        text = read_text(file)
        if file.suffix.lower() == ".json":
            data: Any = json.loads(text, object_pairs_hook=tuple)  # a dict would drop repeats
        else:
            data = [line.strip() for line in text.split("\n")]
    except UserError as error:
        raise UserError(f"classes={error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"classes={file} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(data, (list, tuple)):
        raise UserError(f"classes={file} must name two classes or more")
    classes: dict[str, list[str]] = {}
    for name, prompts in data if isinstance(data, tuple) else ((name, []) for name in data):
        if name == "" and file.suffix.lower() != ".json":
            continue
        if not isinstance(name, (str, int, float)) or not str(name).strip():
            raise UserError(f"classes={file}: {name!r} is no name of a class")
        listed = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(listed, list) or not all(isinstance(p, str) for p in listed):
            raise UserError(f"classes={file}: the prompts of {name} are no text or list of texts")
        name = whole(name).strip() if isinstance(name, str) else label_of(name)
        if name in classes:
            raise UserError(f"classes={file} names {name} twice")
        prompts = [whole(prompt).strip() for prompt in listed if prompt.strip()]
        classes[name] = prompts or [TEMPLATE.format(name)]
    if len(classes) < 2:
        raise UserError(f"classes={file} must name two classes or more")
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
