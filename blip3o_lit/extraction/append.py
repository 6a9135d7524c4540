"""What an append goes on with: a finished store, its towers and formats, and what it holds.

The new shards have names of their own and come into view with the new index, which takes the place
of the old one in a single step; whoever reads the old one reads on.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction.encoding import TowerSet
from blip3o_lit.images.item import Item
from blip3o_lit.tokens.store.index import (
    REJECTS_FILE,
    ArraySpec,
    ShardEntry,
    TokenIndex,
    split_rank,
)
from blip3o_lit.tokens.store.int8 import load_scales
from blip3o_lit.tokens.store.mapped_shard import Shard

RECIPE_FILE = "extraction.json"
CONTENT = "content"
"""Field of KEY.json: the hash of the picture's file."""
_NUMBERED = re.compile(r".+-(\d+)\.tar")


def content_of(raw: bytes | Image.Image) -> str:
    """Return the hash of a picture's file; empty for one that is drawn, which has no file."""
    return "" if isinstance(raw, Image.Image) else hashlib.sha256(raw).hexdigest()[:32]


@dataclass(frozen=True)
class Held:
    """The pictures of a store."""

    contents: frozenset[str]
    keys: frozenset[str]

    def __contains__(self, content: str) -> bool:
        return content in self.contents

    def named(self, item: Item, content: str) -> Item:
        """Return an item under a key that no other sample has: its file may have changed."""
        if item.sample_key not in self.keys:
            return item
        stem = item.sample_key[:-13]
        digest = hashlib.sha256(f"{item.source}\n{content}".encode()).hexdigest()[:12]
        return replace(item, key=f"{stem}-{digest}")


class OldStore:
    """The store that an append adds to."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, TokenIndex.load(folder)

    @property
    def arrays(self) -> dict[str, ArraySpec]:
        return self.index.arrays

    @property
    def first_unit(self) -> int:
        """The number after those of all shards, listed or not."""
        names = [shard.file for shard in self.index.shards]
        matches = (_NUMBERED.fullmatch(name) for name in names)
        return 1 + max((int(match[1]) for match in matches if match), default=-1)

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """What extraction.json says; empty where it is lost."""
        try:
            data = json.loads((self.folder / RECIPE_FILE).read_bytes())
        except (OSError, ValueError):
            return {}
        return data if isinstance(data, dict) else {}

    def scales(self) -> dict[str, np.ndarray]:
        return load_scales(self.folder, self.arrays)

    def check(self, towers: TowerSet, config: ExtractConfig) -> None:
        """Refuse towers, formats and a split rule other than the store's own."""
        there = {n: _described(spec) for n, spec in self.arrays.items() if spec.kind != "scale"}
        here = {name: _described(spec) for name, spec in towers.arrays.items()}
        for name in sorted(there.keys() ^ here.keys()):
            words = ("stored", "not made") if name in there else ("not stored", "made")
            self._refuse(name, *words)
        for name, facts in there.items():
            for key, value in facts.items():
                if here[name].get(key) != value:
                    self._refuse(f"{key} of {name}", value, here[name].get(key))
        formats = {spec.dtype for spec in self.arrays.values() if spec.kind == "tokens"}
        if formats != {config.storage}:
            self._refuse("storage", ", ".join(sorted(formats)), config.storage)
        if (self.index.reduced or "full") != config.store:
            self._refuse("store", self.index.reduced or "full", config.store)
        if self.index.thumbnails != config.thumbnails:
            self._refuse("thumbnails", self.index.thumbnails, config.thumbnails)
        rule, own = self.recipe.get("split", {}), asdict(config.split)
        for key in ("by", "fraction", "seed"):
            if key in rule and rule[key] != own[key]:
                self._refuse(f"split.{key}", rule[key], own[key])

    def _refuse(self, what: str, there: object, here: object) -> None:
        raise UserError(
            f"append=true: {what} is {there} in out={self.folder} and {here} here: give what the "
            "store was made with, or choose another folder"
        )

    def held(self) -> Held:
        """Read the content hash and key of every sample, and those that left by deduplication."""
        contents: set[str] = set()
        keys: set[str] = set()
        for entry in self.index.shards:
            shard = Shard.open(self.folder, entry, self.index, "size")
            for sample in range(entry.samples):
                content = shard.metadata(sample).get(CONTENT)
                if not content:
                    raise UserError(
                        f"append=true: sample {shard.key(sample)} of out={self.folder} has no hash "
                        "of its file, as the demo, conversions and older versions leave it: "
                        "extract into another folder"
                    )
                contents.add(content)
                keys.add(shard.key(sample))
        contents |= {line[CONTENT] for line in self.rejects() if line.get(CONTENT)}
        return Held(frozenset(contents), frozenset(keys))

    def rejects(self) -> list[dict[str, Any]]:
        try:
            text = (self.folder / REJECTS_FILE).read_text("utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines()]

    def has_all_of(self, images: str, fingerprint: str) -> bool:
        """Whether the last that came into the store was this very source, as it is now."""
        appends = self.recipe.get("appends", [])
        last = appends[-1] if appends else self.recipe
        same = (last.get("images"), last.get("content of images")) == (images, fingerprint)
        return bool(fingerprint) and same and last.get("index", self.index.hash) == self.index.hash

    def grown(self, shards: list[ShardEntry], split_rule: str, rejects: int) -> TokenIndex:
        """Return the index with new shards at the end of their splits."""
        both = self.index.shards + sorted(shards, key=lambda shard: shard.file)
        both.sort(key=lambda shard: split_rank(shard.split))
        rules = dict.fromkeys([*self.index.split_rule.split("; else "), split_rule])
        rule = "; else ".join(rule for rule in rules if rule)
        return replace(self.index, shards=both, split_rule=rule, rejects=rejects)


def _described(spec: ArraySpec) -> dict[str, Any]:
    """Return what an append must share with an array, its number format apart."""
    facts = {**spec.to_dict(), "shape": list(spec.shape)}
    return {k: v for k, v in facts.items() if k not in ("dtype", "scale", "scale_hash", "cosine")}
