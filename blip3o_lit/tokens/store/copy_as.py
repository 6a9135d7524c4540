"""Copy a store into another number format: fp16 to int8 or bf16, say."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from blip3o_lit.config.errors import one_of
from blip3o_lit.config.extract import STORAGE
from blip3o_lit.tokens.classes import CLASSES_FILE
from blip3o_lit.tokens.reading.token_store import Place, TokenStore
from blip3o_lit.tokens.store.heads import HEADS_FILE
from blip3o_lit.tokens.store.index import ArraySpec, TokenIndex, lengths_array, sequences_of
from blip3o_lit.tokens.store.int8 import fit_int8
from blip3o_lit.tokens.store.shards import TokenWriter

IMAGES = 256
"""Samples of int8's first pass."""


def copy_as(store: TokenStore, out: Path, storage: str) -> TokenIndex:
    """Write a store to `out` with its tokens in another format; the rest stays.

    Words become what the tokens do, but there are none in int8: in such a store they stay as they
    are. The new index of an int8 store names the cosine to the old tokens.
    """
    one_of("storage", storage, STORAGE)
    arrays: dict[str, ArraySpec] = {}
    scales: dict[str, np.ndarray] = {}
    for name, spec in store.index.arrays.items():
        if spec.kind == "tokens":
            plain = replace(spec, scale=None, scale_hash="", cosine=None)
            if storage == "int8":
                arrays[name], scales[name] = fit_int8(plain, _first_pass(store, name))
            else:
                arrays[name] = replace(plain, dtype=storage)
        elif spec.kind == "sequence" and storage != "int8":
            arrays[name] = replace(spec, dtype=storage)
        elif spec.kind != "scale":
            arrays[name] = spec
    index = store.index
    samples = max(shard.samples for shard in index.shards)
    rule, thumbnails = index.split_rule, index.thumbnails
    with TokenWriter(out, arrays, samples, index.reduced, rule, scales, thumbnails) as writer:
        for number, entry in enumerate(index.shards):
            shard = store.shard(number)
            for sample in range(entry.samples):
                place = Place(number, sample)
                values = _values(store, place, list(arrays))
                key, facts = shard.key(sample), shard.metadata(sample)
                jpeg = shard.thumbnail(sample) if thumbnails else None
                writer.add(entry.split, key, values, thumbnail=jpeg, **facts)
    for name in (HEADS_FILE, CLASSES_FILE):
        if (store.path / name).is_file():
            shutil.copyfile(store.path / name, out / name)
    return TokenIndex.load(out)


def _values(store: TokenStore, place: Place, arrays: list[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a sample as a writer takes them."""
    values: dict[str, np.ndarray] = {}
    for name in sequences_of(store.index.arrays):
        words_RE, values[lengths_array(name)] = store.read_captions(place, name)
        values[name] = words_RE.float().numpy()
    grids = [name for name in arrays if name not in values]
    return values | {name: store.read([place], name)[0].float().numpy() for name in grids}


def _first_pass(store: TokenStore, array: str) -> np.ndarray:
    """Return one array of samples that are spread over all shards, `[S, N, C]` in fp32."""
    total = store.index.samples
    starts = np.cumsum([0] + [shard.samples for shard in store.index.shards])
    out = []
    for position in np.linspace(0, total - 1, min(IMAGES, total)).astype(int).tolist():
        number = int(np.searchsorted(starts, position, "right")) - 1
        place = Place(number, position - int(starts[number]))
        out.append(store.read([place], array).float().numpy())
    return np.concatenate(out)
