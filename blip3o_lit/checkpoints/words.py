"""Captions as a condition: the text tower that a translator's words are of, and their states.

Shape suffixes: B captions, L words of the longest, E their width, M tokens of a grid of width C.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip3o_lit.base.condition import Condition
from blip3o_lit.checkpoints.load import Loaded
from blip3o_lit.config.checks import names_of
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.towers import TextTowerConfig
from blip3o_lit.tokens.reading.open import store_folder
from blip3o_lit.tokens.store.index import ArraySpec, TokenIndex
from blip3o_lit.tokens.store.storage import TORCH_TYPES
from blip3o_lit.tokens.views import sides_of
from blip3o_lit.towers.text_tower import TextTower, load_text_tower


def words_spec(loaded: Loaded) -> ArraySpec:
    """Return whose words a translator reads, from its export or its store.

    Raises:
        UserError: If it reads none, or neither is at hand.
    """
    if loaded.shape.words is None:
        raise UserError(
            f"{loaded.file} reads {loaded.shape.condition_text}, no words: give tokens= or images="
        )
    entry = loaded.facts.get("arrays", {}).get("words")
    if entry:
        return ArraySpec.from_dict("words", entry)
    data = loaded.config.data
    path = store_folder(str(loaded.facts["tokens"]["path"]), data)
    if not (path / "index.json").is_file():
        raise UserError(f"{loaded.file}: {path} is not here to say whose words these are")
    arrays = TokenIndex.load(path).arrays
    _, name = sides_of(names_of(data.condition), arrays)
    assert name is not None  # its shape has words
    return arrays[name]


def text_tower_of(loaded: Loaded, given: TextTowerConfig | None = None) -> TextTower:
    """Load the text tower that the translator's words are of; `given` says how, where need be.

    Raises:
        UserError: If it can't be had, or `given` is another one.
    """
    spec = words_spec(loaded)
    config = given
    if config is None or config.kind is None:
        known = {item.name for item in fields(TextTowerConfig)}
        config = TextTowerConfig(**{k: v for k, v in spec.preprocessing.items() if k in known})
    if config.kind is None:
        raise UserError(
            f"{loaded.file} reads words of {spec.tower}, which lies on another machine or has "
            "random weights: give towers.text.kind= and towers.text.pretrained="
        )
    try:
        tower = load_text_tower(config, device=str(loaded.device))
    except UserError as error:
        raise UserError(f"the text tower {spec.tower} of {loaded.file}: {error}") from error
    if tower.info.name != spec.tower:
        raise UserError(
            f"{loaded.file} reads words of {spec.tower}; towers.text gives {tower.info.name}"
        )
    return tower


def caption_condition(
    captions: Sequence[str], tower: TextTower, dtype: str, grid_BMC: Tensor | None = None
) -> Condition:
    """Return captions as a raw condition, in the number format that a store keeps words in.

    Args:
        captions: Texts; an empty one has its end word alone.
        tower: Gives their states.
        dtype: A key of `TORCH_TYPES`, as float16.
        grid_BMC: Raw grid tokens beside them, where the translator reads both.

    Raises:
        UserError: If the tower does not know a word.
    """
    tower.check(list(captions))
    states = [words_LE.to(TORCH_TYPES[dtype]) for words_LE in tower.states(list(captions))]
    length_B = torch.tensor([len(words_LE) for words_LE in states], device=tower.device)
    grid = None if grid_BMC is None else grid_BMC.to(tower.device)
    return Condition(grid, pad_sequence(states, batch_first=True), length_B)
