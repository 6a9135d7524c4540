"""Class prompts, for zero-shot: read from a file, embedded by the target tower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from blip3o_lit.config.errors import UserError
from blip3o_lit.extraction.pipeline import tower_pool
from blip3o_lit.images.text import label_of, read_text, whole
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.towers.tower import Tower

TEMPLATE = "a photo of a {}."
"""Prompt of a class that comes without one (Radford et al. 2021, section 3.1.4)."""
BATCH = 64


def read_classes(file: Path) -> dict[str, list[str]]:
    """Return the prompts of each class.

    A .json holds `{"name": "prompt" or ["prompt", ...]}` or `["name", ...]`, a text file one name
    per line; empty lines don't count. Names without prompts get `TEMPLATE`.
    """
    classes: dict[str, list[str]] = {}
    for name, prompts in _entries(file):
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


def _entries(file: Path) -> list[tuple[Any, Any]]:
    """Return names and prompts as they stand in the file, names that come twice included."""
    try:
        text = read_text(file)
        if file.suffix.lower() != ".json":
            return [(line.strip(), []) for line in text.split("\n") if line.strip()]
        data = json.loads(text, object_pairs_hook=tuple)  # a dict would drop repeats
    except UserError as error:
        raise UserError(f"classes={error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"classes={file} can't be read: {str(error).splitlines()[0]}") from error
    if isinstance(data, list):
        return [(name, []) for name in data]
    return list(data) if isinstance(data, tuple) else []


def embed_classes(tower: Tower, classes: dict[str, list[str]]) -> Classes | None:
    """Embed each class as the mean of its prompts' unit vectors; None without a text side."""
    prompts = [prompt for listed in classes.values() for prompt in listed]
    batches = [prompts[start : start + BATCH] for start in range(0, len(prompts), BATCH)]
    _, pool = tower_pool(tower.device)
    with pool:
        texts = list(pool.map(tower.encode_text, batches))
    embedded = [text_BP.cpu() for text_BP in texts if text_BP is not None]
    if not embedded:
        return None
    rows = torch.cat(embedded).double().split([len(listed) for listed in classes.values()])
    means = [normalize(normalize(text_MP, dim=-1).mean(0), dim=-1) for text_MP in rows]
    return Classes(list(classes), torch.stack(means).float(), tower.info.name)
