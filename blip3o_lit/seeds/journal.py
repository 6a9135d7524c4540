"""The journal of a conversion: how far it has come, so that a second run goes on from there."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blip3o_lit.base.files import write_synced
from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store.index import ShardEntry

NAME = ".convert.json"
BEGINNING = re.compile(re.escape(f".{NAME}.") + r"[0-9a-f]+\.tmp")
OURS = re.compile(
    r"(train|validation)-\d{6}\.(tar|idx)|\..*\.tmp|rejects\.jsonl|scales\.safetensors|index\.json"
)


@dataclass
class Journal:
    """What is converted, and what of it is done: samples in the files' order, in whole parts."""

    path: Path
    fingerprint: dict[str, Any]
    samples: int = 0
    shards: list[ShardEntry] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, out: Path, fingerprint: dict[str, Any]) -> Journal:
        """Start a journal, or go on with one of the same conversion; remove what it lacks."""
        journal = cls(out / NAME, json.loads(json.dumps(fingerprint)))
        started = journal.path.exists()
        if started:
            journal.read()
        listed = {name for shard in journal.shards for name in (shard.file, shard.offsets)}
        for path in out.iterdir():
            if path.name in listed or path == journal.path:
                continue
            if not (OURS if started else BEGINNING).fullmatch(path.name):
                raise UserError(
                    f"out={out} holds {path.name}, which is not ours: choose a new folder"
                )
            path.unlink()
        journal.write()
        return journal

    def read(self) -> None:
        try:
            content = json.loads(self.path.read_bytes())
            fingerprint = content["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.path} is damaged: remove its folder and start again") from error
        if fingerprint != self.fingerprint:
            raise UserError(
                f"out={self.path.parent} holds the beginning of another conversion (other files or "
                "options): finish that one, or choose a new folder"
            )
        self.samples, self.rejects = content["samples"], content["rejects"]
        self.shards = [ShardEntry(**entry) for entry in content["shards"]]

    def write(self) -> None:
        content = asdict(self)
        del content["path"]
        write_synced(self.path, json.dumps(content).encode())

    def add(self, samples: int, shards: list[ShardEntry], rejects: list[dict[str, Any]]) -> None:
        """Record a part, whose shards are on disk."""
        self.samples += samples
        self.shards += shards
        self.rejects += rejects
        self.write()
