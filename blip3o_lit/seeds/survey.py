"""What the seeds' files hold together: counts, shapes and repeated keys; nothing is written."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from blip3o_lit.base.progress import Work
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.embeddings import SIDES, LegacyFile
from blip3o_lit.seeds.folder import legacy_files, manifest_problems
from blip3o_lit.seeds.split import Split
from blip3o_lit.tokens.store.index import ArraySpec

KEY_LENGTH = 40
"""Longest part of a key that is kept; the store takes 60 characters."""


@dataclass(frozen=True)
class Survey:
    """What all files hold together, known before anything is written."""

    files: list[Path]
    samples: list[int]
    arrays: dict[str, ArraySpec]
    reduced: str | None
    repeated: set[bytes]
    """Digests of the clean keys that occur more than once."""
    gaps: list[str]
    """Shards that the manifest promises and the folder lacks."""
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    """Channel scales `[N, C]` of int8 arrays, once `store.fit_scales` has measured them."""

    @property
    def total(self) -> int:
        """Samples of all files."""
        return sum(self.samples)

    def split(self, config: ConvertConfig) -> Split:
        """Return the split rule for these files."""
        return Split(self.samples, math.prod(self.arrays["eva"].grid), config)


def take_survey(source: Path, config: ConvertConfig) -> Survey:
    """Open every file, check it, and count; numbers are not read.

    Raises:
        UserError: If a file is unsafe, damaged, or not like the first.
    """
    files = legacy_files(source, config.mode)
    samples: list[int] = []
    seen: set[bytes] = set()
    repeated: set[bytes] = set()
    first: tuple[dict[str, ArraySpec], str | None] | None = None
    with Work("reading the files' tables", len(files), "files") as work:
        for path in files:
            with LegacyFile(path, config.mode) as legacy:
                described = describe(legacy, config), "grid_64" if legacy.reduced else None
                first = first or described
                shapes = {name: spec.shape for name, spec in first[0].items()}
                if {name: spec.shape for name, spec in described[0].items()} != shapes:
                    raise UserError(f"{path} holds other token shapes than {files[0].name}")
                samples.append(legacy.samples)
                for key in legacy.keys:
                    if key is not None:
                        mark = key_digest(clean(key))
                        (repeated if mark in seen else seen).add(mark)
            work.advance(1)
    assert first is not None  # noqa: S101 (legacy_files returns at least one file)
    gaps = manifest_problems(source, files, samples) if source.is_dir() else []
    if gaps and config.on_bad == "error":
        raise UserError(
            f"source={source}: {gaps[0]}{f' and {len(gaps) - 1} more' if len(gaps) > 1 else ''}: "
            "copy it again, or on_bad=reject goes on without"
        )
    return Survey(files, samples, first[0], first[1], repeated, gaps)


def describe(legacy: LegacyFile, config: ConvertConfig) -> dict[str, ArraySpec]:
    """Return the index entries of both arrays, as the chosen mode makes them.

    Raises:
        UserError: If a CLS token is wanted and the file has none.
    """
    specs = {}
    for name in SIDES:
        shape = legacy.sides[name].shape
        cls = shape.cls
        if config.mode == "patch_only":
            cls = False
        elif (config.mode == "cls_patch" or config.missing_cls == "mean") and not legacy.reduced:
            if not cls and config.missing_cls == "error":
                raise UserError(
                    f"{legacy.path} has no CLS token in {name}: use mode=patch_only, "
                    "or missing_cls=mean for the mean token in its place"
                )
            cls = True
        tokens = replace(shape, cls=cls).tokens
        specs[name] = ArraySpec(
            "tokens",
            "float16" if config.storage == "int8" else config.storage,
            (tokens, shape.width),
            cls=cls,
            grid=shape.grid,
            tower=legacy.tower(name),
            projected=legacy.projected(name),
        )
    return specs


def clean(key: str) -> str:
    """Return a key that can be a file name: letters, digits, - and _, 40 at most."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", key)[:KEY_LENGTH]


def key_digest(key: str) -> bytes:
    """Return 8 bytes that stand for a key; a collision only makes a key longer."""
    return hashlib.blake2b(key.encode(), digest_size=8).digest()
