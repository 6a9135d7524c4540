"""Which images an evaluation scores on, which its baselines are fitted on, and what of them leaked.

An image leaks where it is scored as held out although the run was trained on it: another store of
the same pictures may have drawn its split anew.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from blip3o_lit.base.condition import Condition
from blip3o_lit.base.home import expanded
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.extraction.direct.kept import kept_store
from blip3o_lit.extraction.direct.store import PictureReader, PictureStore
from blip3o_lit.extraction.engine import device_of
from blip3o_lit.testbeds.token_source import token_stores
from blip3o_lit.tokens.reading.open import open_store, store_folder
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.store_set import StoreSet

COMPARED = 256
"""Images of equal keys whose tokens are compared: keys alone may be mere numbers."""


def open_readers(loaded: Loaded, config: EvaluateConfig) -> tuple[TokenReader, TokenReader | None]:
    """Return the images to score on, and the training split where the store has one."""
    run = loaded.config
    pictures = run.data.name == "images"
    if not pictures:
        data = replace(run.data, tokens=config.data.tokens or _trained_on(loaded))
    elif config.data.tokens:
        data = replace(run.data, name="tokens", images=None, keep=None, tokens=config.data.tokens)
    else:
        data = run.data
    paths = {str(data.images): None} if data.images else token_stores(data)
    path = " + ".join(paths)
    sides = (data.condition, data.target, run.mode)
    train = None
    kept = bool(data.keep) and (expanded(data.keep or "") / "index.json").is_file()
    if data.images and not kept:
        held, train = _of_pictures(run, config)
    elif len(paths) > 1:
        held, train = _several(StoreSet(paths, data), config, data, run.mode)
    else:
        store = kept_store(run, device_of(config.device)) if kept else open_store(path, data)
        if "train" in store.index.splits:
            train = TokenReader(
                store, "train", *sides, max_shards=data.max_shards, limit=data.subset
            )
        if not config.same_data:
            held = TokenReader(store, config.split, *sides, limit=data.validation_subset)
        elif train is not None:
            held = train
        else:
            raise UserError(f"same_data=true: {path} has no train split")
    if not held.shape.fits(loaded.shape):
        raise UserError(
            f"{path} has tokens {held.shape.to_dict()}, but {loaded.file} was trained on "
            f"{loaded.shape.to_dict()}: set data.tokens to a matching store"
        )
    return held, train


def _of_pictures(
    run: TrainConfig, config: EvaluateConfig
) -> tuple[PictureReader, PictureReader | None]:
    """Return both readers of a run's own pictures, which its towers encode at each reading."""
    data = run.data
    store = PictureStore(run, device_of(config.device))
    sides = (data.condition, data.target, run.mode)
    train = None
    if "train" in store.index.splits:
        train = PictureReader(store, "train", *sides, data.max_shards, data.subset)
    if config.same_data and train is not None:
        return train, train
    return PictureReader(store, config.split, *sides, limit=data.validation_subset), train


def _several(
    stores: StoreSet, config: EvaluateConfig, data: DataConfig, mode: ModeConfig
) -> tuple[TokenReader, TokenReader | None]:
    """Return both readers of several stores; each gives an equal part of limited images."""
    sides = (data.condition, data.target, mode)
    stores.check([*names_of(data.condition), data.target])
    train = None
    if stores.with_split("train"):
        train = stores.reader("train", *sides, data.max_shards, data.subset, weighted=True)
    limits = [n for n in (data.validation_subset, config.images) if n]
    limit = min(limits) if limits else None
    if config.same_data and train is None:
        raise UserError(f"same_data=true: {stores.stores[0].path} has no train split")
    split = "train" if config.same_data else config.split
    return stores.reader(split, *sides, limit=limit), train


def trained_images(loaded: Loaded, held: TokenReader) -> int | None:
    """Return how many images of `held` have the tokens of a training image of the run's own store.

    At least this many leaked; None where the run's own store is not at hand.
    """
    run, facts = loaded.config, loaded.facts["tokens"]
    paths = [str(store["path"]) for store in facts.get("stores") or [facts]]
    if not all((store_folder(path, run.data) / "index.json").is_file() for path in paths):
        return None
    stores = StoreSet(dict.fromkeys(paths), run.data)
    if not stores.with_split("train"):
        return None
    own = stores.reader("train", run.data.condition, run.data.target, run.mode)
    if not own.shape.fits(held.shape):
        return 0
    own_keys, held_keys = own.keys(np.arange(len(own))), held.keys(np.arange(len(held)))
    _, trained, scored = np.intersect1d(own_keys, held_keys, return_indices=True)
    equal = 0
    for number in range(min(COMPARED, len(scored))):
        ours, theirs = _tokens(held, scored[number]), _tokens(own, trained[number])
        equal += ours.shape == theirs.shape and bool((ours - theirs).norm() <= 1e-2 * theirs.norm())
    return equal


def _tokens(reader: TokenReader, number: int) -> Tensor:
    """Return the condition of an image: its grid, or its words where these are all of it."""
    condition = reader.read(np.array([number]))["condition"]
    if isinstance(condition, Condition):
        condition = condition.words if condition.grid is None else condition.grid
    return condition.float()


def _trained_on(loaded: Loaded) -> Any:
    """Return the run's own store, or stores.

    Its config may name it relative to a working directory that is not today's; then the full path
    counts.
    """
    configured, full = loaded.config.data.tokens, loaded.facts["tokens"]["path"]
    if isinstance(configured, list | dict):
        return configured
    if configured and not (Path(configured) / "index.json").is_file() and Path(full).is_dir():
        return full
    return configured
