"""The first pass of `storage=int8`: tokens of some images fix the scales of every channel."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np

from blip3o_lit.base.files import one_at_a_time, write_synced
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.extraction.encoding import TowerSet, to_numpy
from blip3o_lit.images.item import Item, Reject, Source, decode
from blip3o_lit.tokens.store.index import ArraySpec
from blip3o_lit.tokens.store.int8 import fit_int8, load_scales, save_scales, with_token_scales

IMAGES = 128
"""Images of the first pass; their tokens are in memory at once."""
PARTS = 16
"""Parts of the source, evenly spread, that the images come from."""


def stored_arrays(
    towers: TowerSet, source: Source, config: ExtractConfig, state: Path
) -> tuple[dict[str, ArraySpec], dict[str, np.ndarray]]:
    """Return the arrays as they are stored, and the channel scales `[N, C]` of int8 ones.

    The first pass leaves its result in `state`, so that a later run and other workers use the same
    scales. Of workers that start at once, one measures and the others wait for it: on a GPU two
    measurements need not agree to the last bit.
    """
    if config.storage != "int8":
        return towers.arrays, {}
    file = state / "arrays.json"
    with one_at_a_time(file):
        if not file.is_file():
            arrays, scales = dict(towers.arrays), {}
            for name, samples_SNC in _first_pass(towers, source, config).items():
                arrays[name], scales[name] = fit_int8(arrays[name], samples_SNC)
            save_scales(state, scales)
            entries = {n: spec.to_dict() for n, spec in with_token_scales(arrays).items()}
            write_synced(file, json.dumps(entries).encode())
    entries = json.loads(file.read_bytes())
    arrays = {name: ArraySpec.from_dict(name, entry) for name, entry in entries.items()}
    return arrays, load_scales(state, arrays)


def _first_pass(towers: TowerSet, source: Source, config: ExtractConfig) -> dict[str, np.ndarray]:
    """Return the tokens `[S, N, C]` of images from all over the source."""
    numbers = np.unique(np.linspace(0, len(source.parts) - 1, PARTS).astype(int)).tolist()
    inputs, captions = [], []
    for number in numbers:
        items = (e for e in source.parts[number].entries() if isinstance(e, Item))
        for item in islice(items, -(-IMAGES // len(numbers))):
            try:
                inputs.append(towers.prepare(decode(item.read(), config.pixels)))
            except Reject:
                continue
            captions.append(item.captions)
    if not inputs:
        raise UserError(f"images={source.name}: none of the first images can be read")
    batches = []
    batch_size = config.extract.batch_size
    for start in range(0, len(inputs), batch_size):
        cut = slice(start, start + batch_size)
        batches.append(towers.encode(inputs[cut], captions[cut]))
        event = towers.mark()
        if event is not None:
            event.synchronize()
    return {
        name: np.concatenate([to_numpy(batch[name]) for batch in batches])
        for name, spec in towers.arrays.items()
        if spec.kind == "tokens"
    }
