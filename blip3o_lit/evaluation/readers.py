"""Which images an evaluation scores on, and which ones its baselines are fitted on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import BASELINE_SETS, EvaluateConfig
from blip3o_lit.testbeds.token_source import token_store
from blip3o_lit.tokens.classes import CLASSES_FILE
from blip3o_lit.tokens.reading.reader import TokenReader, TokenStore
from blip3o_lit.tokens.store.heads import HEADS_FILE
from blip3o_lit.tokens.store.remote_store import RemoteStore, is_url


def open_readers(loaded: Loaded, config: EvaluateConfig) -> tuple[TokenReader, TokenReader | None]:
    """Return the images to score on, and the training split where the store has one.

    Raises:
        UserError: If the store lacks the split, or its tokens are not those of the checkpoint.
    """
    run = loaded.config
    data = replace(run.data, tokens=config.data.tokens or _trained_on(loaded))
    path = token_store(data)
    store = _remote(path, config, data) if is_url(path) else TokenStore.open(path, data.verify)
    sides = (data.condition, data.target, run.mode)

    def reader(split: str, shards: int | None, limit: int | None) -> TokenReader:
        return TokenReader(store, split, *sides, max_shards=shards, limit=limit)

    train = None
    if "train" in store.index.splits:
        train = reader("train", data.max_shards, data.subset)
    if config.same_data:
        if train is None:
            raise UserError(f"same_data=true: {store.path} has no train split")
        held = train
    else:
        held = reader(config.split, None, data.validation_subset)
    if held.shape != loaded.shape:
        raise UserError(
            f"{store.path} has tokens {held.shape.to_dict()}, but {loaded.file} was trained on "
            f"{loaded.shape.to_dict()}: set data.tokens to a matching store"
        )
    return held, train


def _remote(url: str, config: EvaluateConfig, data: DataConfig) -> TokenStore:
    """Download the split that is scored on, and what captions and classes need.

    Raises:
        UserError: If baselines are asked for, which are fitted on training tokens in any order.
    """
    if BASELINE_SETS[config.baselines] or config.same_data or config.split == "train":
        raise UserError(
            f"data.tokens={url} has no random access, which training tokens need here: add "
            "baselines=none, or copy the store and give its folder"
        )
    remote = RemoteStore(url, data.verify)
    for name in (HEADS_FILE, CLASSES_FILE):
        if remote.offers(name):
            remote.fetch(name)
    return remote.local_split(config.split, data.validation_subset or config.images)


def _trained_on(loaded: Loaded) -> str | None:
    """Return the store of the run's config; its full path where the given one is another folder's.

    A run may have been started with a path relative to a working directory that is not today's.
    """
    given, noted = loaded.config.data.tokens, loaded.facts["tokens"]["path"]
    if given and not (Path(given) / "index.json").is_file() and Path(noted).is_dir():
        return noted
    return given
