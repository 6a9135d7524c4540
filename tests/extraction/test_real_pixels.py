"""Photographs through the towers of a real pair, into shards, then a training step.

Weights are random with a fixed seed: nothing is downloaded.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from skimage import data as skimage_data
from sklearn.datasets import load_sample_images

from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.cli.schema import conf_dir
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.model import ModelConfig
from blip3o_lit.config.towers import TowerConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import EvaluationConfig, LoggerConfig, PrecisionConfig, TrainerConfig
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.towers.load import load_tower
from blip3o_lit.towers.tower import Tower
from blip3o_lit.training.run import run_training


def photographs(folder: Path) -> None:
    """Save photographs and a table that gives their splits."""
    pictures = dict(zip(("china", "flower"), load_sample_images().images))
    pictures["astronaut"] = skimage_data.astronaut()
    with open(folder / "list.csv", "w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["path", "split"])
        for name, pixels in pictures.items():
            Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=90)
            writer.writerow([f"{name}.jpg", "validation" if name == "astronaut" else "train"])


def towers(models: tuple[str, str]) -> dict[str, Tower]:
    """Build the pair of conf/towers/eva02l_clipl14.yaml, of these sizes, with random weights."""
    group = yaml.safe_load((conf_dir() / "towers" / "eva02l_clipl14.yaml").read_text())
    pair = {}
    for name, side, model in zip(("eva", "clip"), ("condition", "target"), models):
        pair[name] = load_tower(TowerConfig(**{**group[side], "model": model}), False)
    return pair


BASE, LARGE = ("EVA02-B-16", "ViT-B-16-quickgelu"), ("EVA02-L-14", "ViT-L-14-quickgelu")


@pytest.mark.parametrize(
    ("models", "stored_as"),
    [(BASE, (197, 768)), pytest.param(LARGE, (257, 1024), marks=pytest.mark.soak)],
)
@pytest.mark.timeout(900)
def test_photographs_become_tokens_that_train(
    models: tuple[str, str], stored_as: tuple[int, int], tmp_path: Path
) -> None:
    photographs(tmp_path)
    pair, out = towers(models), tmp_path / "tokens"
    engine = EngineConfig(batch_size=2, shard_samples=2, threads=1, device="cpu")
    source = open_source(str(tmp_path / "list.csv"), engine.shard_samples)
    extract(source, pair, out, ExtractConfig(extract=engine))
    store = TokenStore.open(out, verify="full")
    assert store.index.splits == {"train": 2, "validation": 1}
    specs = store.index.arrays
    towers_of = [specs[name].tower for name in ("eva", "clip")]
    assert towers_of == [f"open_clip:{model}/random" for model in models]
    assert [specs[name].shape for name in ("eva", "clip")] == [stored_as, stored_as]
    reader, ids = TokenReader(store, "validation", mode=ModeConfig("cls_patch")), np.array([0])
    assert reader.metadata(ids)[0]["source"] == "astronaut.jpg"
    stored = reader.read(ids)["target"][0].float()
    tower = pair["clip"]
    with torch.inference_mode(), Image.open(tmp_path / "astronaut.jpg") as image:
        true = tower.tokens(tower.preprocess(image)[None])[0]
    assert torch.cosine_similarity(stored, true, -1).min() > 0.99999
    config = TrainConfig(
        model=ModelConfig(width=32, depth=1, heads=2, kv_heads=1, mlp_width=32),
        mode=ModeConfig("cls_patch"),
        data=DataConfig(name="tokens", tokens=str(out)),
        precision=PrecisionConfig("fp32"),
        trainer=TrainerConfig(max_steps=1, log_every=1, accelerator="cpu"),
        evaluation=EvaluationConfig(every=1, images=1),
        logger=LoggerConfig(tensorboard=False),
        batch_size=2,
    )
    run_training(config, tmp_path / "run", [])
    rows = read_rows(tmp_path / "run" / "metrics.csv")
    (loss,) = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert np.isfinite(loss)
