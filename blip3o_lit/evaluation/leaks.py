"""Images that are scored as held out although the run was trained on them.

Another store of the same pictures may have drawn its split anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.tokens.reading.reader import TokenReader, TokenStore

COMPARED = 256
"""Images of equal keys whose tokens are compared: keys alone may be mere numbers."""


def trained_images(loaded: Loaded, held: TokenReader) -> int | None:
    """Return how many scored images have the tokens of a training image of the run's own store.

    Args:
        loaded: The run.
        held: The images to score on, of a store that is not the run's own.

    Returns:
        At least this many; None where the run's own store is not at hand.
    """
    run, place = loaded.config, Path(str(loaded.facts["tokens"]["path"]))
    if not (place / "index.json").is_file():
        return None
    store = TokenStore.open(place)
    if "train" not in store.index.splits:
        return None
    own = TokenReader(store, "train", run.data.condition, run.data.target, run.mode)
    if own.shape != held.shape:
        return 0
    places = {key: number for number, key in enumerate(own.keys(np.arange(len(own))))}
    shared = [
        (number, places[key])
        for number, key in enumerate(held.keys(np.arange(len(held))))
        if key in places
    ]
    equal = 0
    for scored, trained in shared[:COMPARED]:
        pair = held.read(np.array([scored])), own.read(np.array([trained]))
        ours, theirs = (batch["condition"].float() for batch in pair)
        equal += bool((ours - theirs).norm() <= 1e-2 * theirs.norm())
    return equal
