"""Which images an evaluation scores on, which its baselines are fitted on, and what of them leaked.

An image leaks where it is scored as held out although the run was trained on it: another store of
the same pictures may have drawn its split anew.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import BASELINE_SETS, EvaluateConfig
from blip3o_lit.testbeds.token_source import token_store
from blip3o_lit.tokens.classes import CLASSES_FILE
from blip3o_lit.tokens.reading.reader import TokenReader, TokenStore
from blip3o_lit.tokens.store.heads import HEADS_FILE
from blip3o_lit.tokens.store.remote_store import RemoteStore, is_url

COMPARED = 256
"""Images of equal keys whose tokens are compared: keys alone may be mere numbers."""


def open_readers(loaded: Loaded, config: EvaluateConfig) -> tuple[TokenReader, TokenReader | None]:
    """Return the images to score on, and the training split where the store has one."""
    run = loaded.config
    data = replace(run.data, tokens=config.data.tokens or _trained_on(loaded))
    path = token_store(data)
    store = _remote(path, config, data) if is_url(path) else TokenStore.open(path, data.verify)
    sides = (data.condition, data.target, run.mode)
    train = None
    if "train" in store.index.splits:
        train = TokenReader(store, "train", *sides, max_shards=data.max_shards, limit=data.subset)
    if not config.same_data:
        held = TokenReader(store, config.split, *sides, limit=data.validation_subset)
    elif train is not None:
        held = train
    else:
        raise UserError(f"same_data=true: {store.path} has no train split")
    if held.shape != loaded.shape:
        raise UserError(
            f"{store.path} has tokens {held.shape.to_dict()}, but {loaded.file} was trained on "
            f"{loaded.shape.to_dict()}: set data.tokens to a matching store"
        )
    return held, train


def trained_images(loaded: Loaded, held: TokenReader) -> int | None:
    """Return how many images of `held` have the tokens of a training image of the run's own store.

    At least this many leaked; None where the run's own store is not at hand.
    """
    run, path = loaded.config, Path(str(loaded.facts["tokens"]["path"]))
    if not (path / "index.json").is_file():
        return None
    store = TokenStore.open(path)
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


def _remote(url: str, config: EvaluateConfig, data: DataConfig) -> TokenStore:
    """Download the split that is scored on, and what captions and classes need."""
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
    """Return the run's own store.

    Its config may name it relative to a working directory that is not today's; then the full path
    counts.
    """
    configured, full = loaded.config.data.tokens, loaded.facts["tokens"]["path"]
    if configured and not (Path(configured) / "index.json").is_file() and Path(full).is_dir():
        return full
    return configured
