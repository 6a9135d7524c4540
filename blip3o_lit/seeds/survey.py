"""What the seeds' files hold together: counts, shapes and repeated keys; nothing is written."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from blip3o_lit.base.progress import Work
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.embeddings import SIDES, LegacyFile
from blip3o_lit.seeds.folder import legacy_files, manifest_problems
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
    repeated: set[str]
    """Clean keys that occur more than once."""
    gaps: list[str]
    """Shards that the manifest promises and the folder lacks."""


def take_survey(source: Path, config: ConvertConfig) -> Survey:
    """Open every file, check it, and count; numbers are not read."""
    files = legacy_files(source, config.mode)
    samples: list[int] = []
    arrays: list[dict[str, ArraySpec]] = []
    reduced = None
    keys: set[str] = set()
    repeated: set[str] = set()
    with Work("reading the files' tables", len(files), "files") as work:
        for path in files:
            legacy = LegacyFile(path, config.mode)
            reduced = "grid_64" if legacy.reduced else None
            arrays.append({name: describe(legacy, name, config) for name in SIDES})
            if any(arrays[-1][name].shape != arrays[0][name].shape for name in SIDES):
                raise UserError(f"{path} holds other token shapes than {files[0].name}")
            samples.append(legacy.samples)
            for key in legacy.keys:
                if key is not None:
                    (repeated if clean(key) in keys else keys).add(clean(key))
            del legacy  # before the next is opened: torch can't map its oldest format
            work.advance(1)
    gaps = manifest_problems(source, files, samples) if source.is_dir() else []
    if gaps and config.on_bad == "error":
        more = f" and {len(gaps) - 1} more" if len(gaps) > 1 else ""
        raise UserError(
            f"source={source}: {gaps[0]}{more}: copy it again, or on_bad=reject goes on without"
        )
    return Survey(files, samples, arrays[0], reduced, repeated, gaps)


def describe(legacy: LegacyFile, name: str, config: ConvertConfig) -> ArraySpec:
    """Return the index entry of an array, as the chosen mode makes it."""
    shape = legacy.sides[name].shape
    wants_cls = config.mode == "cls_patch" or config.missing_cls == "mean"
    if config.mode == "patch_only":
        shape = replace(shape, cls=False)
    elif wants_cls and not shape.cls and not legacy.reduced:
        if config.missing_cls == "error":
            raise UserError(
                f"{legacy.path} has no CLS token in {name}: use mode=patch_only, "
                "or missing_cls=mean for the mean token in its place"
            )
        shape = replace(shape, cls=True)
    return ArraySpec(
        "tokens",
        "float16" if config.storage == "int8" else config.storage,
        (shape.tokens, shape.width),
        cls=shape.cls,
        grid=shape.grid,
        tower=legacy.tower(name),
        projected=legacy.projected(name),
    )


def clean(key: str) -> str:
    """Return a key that can be a file name: letters, digits, - and _, 40 at most."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", key)[:KEY_LENGTH]
