"""Which images an evaluation scores on, which its baselines are fitted on, and what of them leaked.

An image leaks where it is scored as held out although the run was trained on it: another store of
the same pictures may have drawn its split anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.testbeds.token_source import token_store
from blip3o_lit.tokens.reading.open import open_store, store_folder
from blip3o_lit.tokens.reading.reader import TokenReader

COMPARED = 256
"""Images of equal keys whose tokens are compared: keys alone may be mere numbers."""


def open_readers(loaded: Loaded, config: EvaluateConfig) -> tuple[TokenReader, TokenReader | None]:
    """Return the images to score on, and the training split where the store has one.

    Raises:
        UserError: If the store lacks the split, or its tokens are not those of the checkpoint.
    """
    run = loaded.config
    data = replace(run.data, tokens=config.data.tokens or _trained_on(loaded))
    store = open_store(token_store(data), data)
    sides = (data.condition, data.target, run.mode)
    train = None
    if "train" in store.index.splits:
        train = TokenReader(store, "train", *sides, max_shards=data.max_shards, limit=data.subset)
    if not config.same_data:
        held = TokenReader(store, config.split, *sides, limit=data.validation_subset)
    elif train is not None:
        held = train
    else:
        raise UserError(f"same_data=true: {store.address} has no train split")
    if held.shape != loaded.shape:
        raise UserError(
            f"{store.address} has tokens {held.shape.to_dict()}, but {loaded.file} was trained on "
            f"{loaded.shape.to_dict()}: set data.tokens to a matching store"
        )
    return held, train


def trained_images(loaded: Loaded, held: TokenReader) -> int | None:
    """Return how many images of `held` have the tokens of a training image of the run's own store.

    At least this many leaked; None where the run's own store is not at hand.
    """
    run, address = loaded.config, str(loaded.facts["tokens"]["path"])
    if not (store_folder(address, run.data) / "index.json").is_file():
        return None
    store = open_store(address, run.data)
    if "train" not in store.index.splits:
        return None
    own = TokenReader(store, "train", run.data.condition, run.data.target, run.mode)
    if own.shape != held.shape:
        return 0
    own_keys, held_keys = own.keys(np.arange(len(own))), held.keys(np.arange(len(held)))
    _, trained, scored = np.intersect1d(own_keys, held_keys, return_indices=True)
    equal = 0
    for number in range(min(COMPARED, len(scored))):
        ours = held.read(scored[[number]])["condition"].float()
        theirs = own.read(trained[[number]])["condition"].float()
        equal += bool((ours - theirs).norm() <= 1e-2 * theirs.norm())
    return equal


def _trained_on(loaded: Loaded) -> str | None:
    """Return the run's own store.

    Its config may name it relative to a working directory that is not today's; then the full path
    counts.
    """
    configured, full = loaded.config.data.tokens, loaded.facts["tokens"]["path"]
    if configured and not (Path(configured) / "index.json").is_file() and Path(full).is_dir():
        return full
    return configured
