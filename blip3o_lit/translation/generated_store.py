"""A store of generated tokens, with the keys, captions and shard boundaries of its source.

A shard appears whole or not at all, so a stopped writer goes on with the first missing shard.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blip3o_lit.base.progress import Report
from blip3o_lit.config.solver import SolverConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.store.checksums import checksums_of
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.shards import ShardWriter
from blip3o_lit.translation.begun import begin
from blip3o_lit.translation.translator import Translator


@dataclass
class GeneratedStore:
    """Writes to `out` what a translator makes of a source's condition tokens.

    `settings` are all that the tokens are a function of; a folder that was begun with others is
    refused.
    """

    out: Path
    array: str
    spec: ArraySpec
    settings: dict[str, Any]
    translator: Translator
    solver: SolverConfig
    seed: int
    batch_size: int

    def write(self, readers: dict[str, TokenReader], report: Report) -> TokenIndex:
        """Write the shards that are missing, then the index; `readers` are the source's splits."""
        begin(self.out, self.settings, ("index.json",))
        entries: list[ShardEntry] = []
        for split, reader in readers.items():
            first = 0
            for number, samples in enumerate(reader.shard_sizes.tolist()):
                name = f"{split}-{number:06d}"
                entry = self._written(name, split, samples)
                entries.append(entry or self._write_shard(name, reader, first, first + samples))
                first += samples
                report(split, first, len(reader))
        source = next(iter(readers.values()))
        reduced = source.mode.name if source.mode.name == "grid_64" else None
        index = TokenIndex({self.array: self.spec}, entries, reduced, source.index.split_rule)
        index.write(self.out)
        return index

    def _written(self, name: str, split: str, samples: int) -> ShardEntry | None:
        """Return the entry of a shard that an earlier call wrote, or None."""
        tar, offsets = self.out / f"{name}.tar", self.out / f"{name}.idx"
        if not tar.is_file() or not offsets.is_file():
            return None
        size, sums = tar.stat().st_size, checksums_of(tar)
        return ShardEntry(tar.name, offsets.name, split, samples, size, sums.sha256, sums.crc32)

    def _write_shard(self, name: str, reader: TokenReader, first: int, end: int) -> ShardEntry:
        """Generate and write the samples `first` to `end` of a reader."""
        device = next(self.translator.network.parameters()).device
        writer = ShardWriter(self.out, name, reader.split, {self.array: self.spec})
        try:
            for start in range(first, end, self.batch_size):
                ids = np.arange(start, min(start + self.batch_size, end))
                condition = reader.read(ids)["condition"].to(device)
                sample_B = torch.from_numpy(ids)
                result = self.translator.generate(condition, sample_B, self.seed, self.solver)
                tokens = result.x1_BND.cpu().numpy()
                for key, metadata, value in zip(reader.keys(ids), reader.metadata(ids), tokens):
                    writer.add(key, {self.array: value}, metadata)
            return writer.close()
        except BaseException:
            writer.abort()
            raise
