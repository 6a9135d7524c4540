"""The index of a token store: which arrays every sample has, and which shards hold them."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blip3o_lit import __version__
from blip3o_lit.base.files import write_synced
from blip3o_lit.base.shape import TokenShape
from blip3o_lit.base.words import pasteable
from blip3o_lit.config.errors import UserError, one_of

SCHEMA = 1
SIDES = {"tokens": 2, "text": 1, "scale": 1, "sequence": 2, "lengths": 1}
"""Kinds of arrays, and how many sides each has."""
STORED = {
    "float16": "<f2",
    "bfloat16": "<i2",
    "float32": "<f4",
    "int8": "|i1",
    "int32": "<i4",
}
"""Types in index.json and in the npy files; npy knows no bfloat16, so its bits go in as int16."""
SCALES = ("channel", "token")
REJECTS_FILE = "rejects.jsonl"
"""Beside a store's index: what was given and is not in it, and why."""
KEY_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
"""What names of samples, arrays and splits are made of: they are parts of file names."""
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*").fullmatch
SHA256 = re.compile(r"[0-9a-f]{64}").fullmatch
CRC32 = re.compile(r"[0-9a-f]{8}|").fullmatch


@dataclass(frozen=True)
class ArraySpec:
    """One array of every sample: its type, its shape and where it came from."""

    kind: str
    """tokens (a grid), text (a caption embedding of unit norm), scale (of int8 tokens), sequence
    (the captions' own tokens, as many as they have) or lengths (of a sequence's captions)."""
    dtype: str
    """A key of `STORED`."""
    shape: tuple[int, ...]
    """`[N, C]` for tokens, `[P]` for text, `[N]` for scales; for a sequence the longest caption
    that may come and its width, `[L, E]`; for its lengths the most captions of an image, `[K]`."""
    cls: bool = False
    """Whether token 0 is a CLS token."""
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of the patches; unused by text."""
    tower: str = ""
    """Architecture and weights of the encoder."""
    layer: int = -1
    """Block whose output this is."""
    normed: bool = False
    """Whether the tower's final norm is in it."""
    projected: bool = False
    """Whether the tower's projection is in it."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """Mean, std, interpolation and resize mode of the encoder's input; of a sequence, the keys of
    `towers.text` that build its tower, where they name no file of this machine."""
    scale: str | None = None
    """Of int8: channel, or token where each token has a scale of its own too."""
    scale_hash: str = ""
    """Of int8: checksum of the channel scales in scales.safetensors."""
    cosine: float | None = None
    """Of int8: mean cosine of stored to true tokens, measured on the first pass's samples."""

    @property
    def token_shape(self) -> TokenShape:
        return TokenShape(self.grid, self.cls, self.shape[-1])

    @property
    def stored(self) -> str:
        return STORED[self.dtype]

    @property
    def nbytes(self) -> int:
        """Bytes of one sample; of a sequence, those of one caption of full length."""
        return int(np.prod(self.shape)) * np.dtype(self.stored).itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one token."""
        return self.nbytes // self.shape[0]

    def to_dict(self) -> dict[str, Any]:
        out = asdict(self)
        out["shape"], out["grid"] = list(self.shape), list(self.grid)
        if self.kind != "tokens":
            beside = ("preprocessing",) if self.preprocessing else ()
            return {key: out[key] for key in ("kind", "dtype", "shape", "tower", *beside)}
        int8 = ("scale", "scale_hash", "cosine")
        return {k: v for k, v in out.items() if k not in int8 or self.dtype == "int8"}

    @classmethod
    def from_dict(cls, name: str, data: dict[str, Any]) -> ArraySpec:
        """Read and check one entry of index.json."""
        one_of(f"arrays.{name}.kind", data.get("kind", ""), SIDES)
        one_of(f"arrays.{name}.dtype", data.get("dtype", ""), STORED)
        shape = tuple(int(side) for side in data["shape"])
        values = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        spec = cls(**{**values, "shape": shape, "grid": tuple(data.get("grid", (0, 0)))})
        if spec.kind == "sequence" and spec.dtype == "int8":
            raise UserError(f"arrays.{name} is a sequence, which has no int8: float16, say")
        if spec.dtype == "int8":
            one_of(f"arrays.{name}.scale", str(spec.scale), SCALES)
        if (spec.dtype == "int32") != (spec.kind == "lengths"):
            raise UserError(f"arrays.{name}: lengths are int32 and nothing else, not {spec.dtype}")
        sides = SIDES[spec.kind]
        if len(shape) != sides or min(shape) < 1:
            raise UserError(f"arrays.{name}.shape={list(shape)} must have {sides} sides above 0")
        if spec.kind == "tokens" and (
            len(spec.grid) != 2 or spec.token_shape.tokens != shape[0] or min(spec.grid) < 1
        ):
            raise UserError(
                f"arrays.{name}.shape={list(shape)} does not hold a {list(spec.grid)} grid"
                f"{' and a CLS token' if spec.cls else ''}"
            )
        return spec


@dataclass(frozen=True)
class ShardEntry:
    """One tar of a store."""

    file: str
    offsets: str
    split: str
    samples: int
    bytes: int
    sha256: str
    crc32: str = ""
    """Of the tar, 8 digits base 16; empty where an older version wrote it."""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "crc32" or value}


@dataclass(frozen=True)
class TokenIndex:
    """What index.json says about a store."""

    arrays: dict[str, ArraySpec]
    shards: list[ShardEntry]
    reduced: str | None = None
    """None for full stores, `grid_64` for stores of 64 averaged tokens."""
    split_rule: str = ""
    """How the split was made, in words."""
    rejects: int = 0
    """Images that could not be read."""
    thumbnails: bool = False
    """Whether every sample has a KEY.jpg: what the target tower saw of it, made small."""
    created_by: str = f"blip3o_lit {__version__}"

    @property
    def splits(self) -> dict[str, int]:
        """Samples per split, in the order of the shards."""
        counts: Counter[str] = Counter()
        for shard in self.shards:
            counts[shard.split] += shard.samples
        return dict(counts)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def columns(self) -> int:
        """Numbers per sample in an .idx file."""
        return len(self.arrays) + len(self.sequences) + (4 if self.thumbnails else 2)

    @property
    def sequences(self) -> list[str]:
        """The arrays of kind sequence."""
        return sequences_of(self.arrays)

    @property
    def hash(self) -> str:
        """Content hash: sha256 over the arrays' entries and the shards' checksums."""
        content = [
            {name: spec.to_dict() for name, spec in self.arrays.items()},
            [(s.file, s.split, s.samples, s.sha256) for s in self.shards],
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "samples": self.samples,
            "created_by": self.created_by,
            "arrays": {name: spec.to_dict() for name, spec in self.arrays.items()},
            "reduced": self.reduced,
            "thumbnails": self.thumbnails,
            "splits": self.splits,
            "split_rule": self.split_rule,
            "rejects": self.rejects,
            "shards": [shard.to_dict() for shard in self.shards],
        }

    def write(self, folder: Path) -> None:
        write_synced(folder / "index.json", json.dumps(self.to_dict(), indent=1).encode())

    @classmethod
    def load(cls, folder: Path | str) -> TokenIndex:
        """Read and check the index of a local store."""
        path = Path(folder) / "index.json"
        if not path.is_file():
            raise UserError(
                f"no token store at {folder}: index.json is missing; "
                "set data.tokens to a folder that extract or convert wrote"
            )
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, where: str) -> TokenIndex:
        """Check the bytes of an index.json; `where` names it in messages."""
        try:
            data = json.loads(content)
            schema = data["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{where} is no token index: extract or convert again") from error
        if schema != SCHEMA:
            age = "newer" if isinstance(schema, int) and schema > SCHEMA else "older"
            fix = "update blip3o_lit" if age == "newer" else "extract or convert again"
            raise UserError(f"{where} has the {age} schema {schema!r}, not {SCHEMA}: {fix}")
        repair = repair_command(Path(where).parent)
        try:
            index = cls(
                {str(k): ArraySpec.from_dict(k, v) for k, v in data["arrays"].items()},
                [ShardEntry(**shard) for shard in data["shards"]],
                data["reduced"],
                str(data.get("split_rule", "")),
                int(data.get("rejects", 0)),
                data.get("thumbnails") is True,
                str(data.get("created_by", "")),
            )
            index._check()
            if data["splits"] != index.splits or data["samples"] != index.samples:
                raise UserError(f"the counts of samples, splits and shards disagree: {repair}")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"{where} is damaged ({reason}): {repair}") from error
        return index

    def _check(self) -> None:
        if not self.arrays or not self.shards:
            raise UserError("no arrays or no shards: extract or convert again")
        if self.reduced is not None:
            one_of("reduced", self.reduced, ("grid_64",))
        for name, spec in self.arrays.items():
            check_array_name(name)
            if spec.scale == "token" and f"{name}_scale" not in self.arrays:
                raise UserError(f"array {name} has no {name}_scale: extract again")
        check_lengths_arrays(self.arrays)
        for shard in self.shards:
            for file in (shard.file, shard.offsets):
                if not SAFE_NAME(file):
                    raise UserError(f"shard name {file!r} leaves the folder: the store is not ours")
            if not SHA256(shard.sha256):
                raise UserError(f"shard {shard.file} has no sha256")
            if not CRC32(shard.crc32):
                raise UserError(
                    f"shard {shard.file}: {shard.crc32!r} is no crc32 (8 digits): leave it out"
                )
            if min(shard.samples, shard.bytes) < 1 or not shard.split:
                raise UserError(f"shard {shard.file} counts {shard.samples} samples")


def lengths_array(name: str) -> str:
    """Return the name of the array that holds the lengths of a sequence's captions."""
    return f"{name}_lengths"


def sequences_of(arrays: dict[str, ArraySpec]) -> list[str]:
    """Return the names of the arrays of kind sequence."""
    return [name for name, spec in arrays.items() if spec.kind == "sequence"]


def check_lengths_arrays(arrays: dict[str, ArraySpec]) -> None:
    """Refuse a sequence without lengths, and lengths without their sequence."""
    given = {name for name, spec in arrays.items() if spec.kind == "lengths"}
    needed = {lengths_array(name): name for name in sequences_of(arrays)}
    for name in sorted(given ^ needed.keys()):
        missing = f"array {needed[name]} has no {name}" if name in needed else f"{name} is of none"
        raise UserError(f"{missing}: a sequence and its lengths belong together, extract again")


def split_rank(split: str) -> str:
    """Return what splits are sorted by in an index: train, validation, then the others by name."""
    return {"train": "0", "validation": "1"}.get(split, "2" + split)


def repair_command(folder: Path) -> str:
    """Return the command that writes a store's index and offsets again."""
    return f"python -m blip3o_lit.doctor {pasteable('tokens', folder)} repair=true"


def check_array_name(name: str) -> None:
    if not name or not KEY_CHARACTERS.issuperset(name) or name in ("jpg", "json"):
        raise UserError(f"array name {name!r} may hold letters, digits, - and _ alone")


def check_split(name: str) -> None:
    """Refuse a split whose name can't be part of a file name."""
    if not name or not KEY_CHARACTERS.issuperset(name):
        raise UserError(f"split name {name!r} may hold letters, digits, - and _ alone")
