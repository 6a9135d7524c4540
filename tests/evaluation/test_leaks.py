"""Images that were trained on are seen in another store of the same pictures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from made_run import make_run

from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig, EvaluateDataConfig
from blip3o_lit.evaluate import evaluate
from blip3o_lit.evaluation.readers import open_readers, trained_images


def swapped_splits(store: Path, copy: Path) -> Path:
    """Copy a store with its two splits exchanged, as another draw might leave them."""
    shutil.copytree(store, copy)
    index = json.loads((copy / "index.json").read_text())
    other = {"train": "validation", "validation": "train"}
    for shard in index["shards"]:
        shard["split"] = other[shard["split"]]
    index["splits"] = {other[name]: value for name, value in index["splits"].items()}
    (copy / "index.json").write_text(json.dumps(index))
    return copy


def test_images_that_were_trained_on_are_not_scored_as_held_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    loaded = load(run)
    store = Path(loaded.facts["tokens"]["path"])
    anew = swapped_splits(store, tmp_path / "anew")
    there = EvaluateDataConfig(tokens=str(anew))
    config = EvaluateConfig(ckpt=str(run), device="cpu", data=there)
    assert trained_images(loaded, open_readers(loaded, config)[0]) == 256
    with pytest.raises(UserError, match="trained on 256 or more of its 256 validation images"):
        evaluate(config)
    own = open_readers(loaded, EvaluateConfig(ckpt=str(run), device="cpu"))[0]
    assert trained_images(loaded, own) == 0
