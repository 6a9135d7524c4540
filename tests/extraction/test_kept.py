"""data.keep: the steps of a run on the extracted store, whenever and by whomever it was stored."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from disturbed import Disturbance, assert_same_end, run
from PIL import Image
from quick_run import config
from small_disk import fill, small_disk

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.load import load
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import EngineConfig, ExtractConfig, SplitConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    StrategyConfig,
    TrainerConfig,
)
from blip3o_lit.evaluation.readers import open_readers
from blip3o_lit.extraction.direct.kept import KeptShards
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.item import Item
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import scene
from blip3o_lit.training.run import run_training

SPLIT = SplitConfig(by="content", fraction=0.3)
STEPS, BATCH = 14, 4
"""Of 35 training images: the second epoch begins in step 9."""


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten tars of five pictures: ten units."""
    folder = tmp_path_factory.mktemp("tars")
    for number in range(50):
        name = f"{number:02d}.png"
        scene("train", number).image.save(folder / name)
        with tarfile.open(folder / f"{number // 5}.tar", "a") as archive:
            archive.add(folder / name, name)
        (folder / name).unlink()
    return str(folder / "{0..9}.tar")


def wanted(images: str, ranks: int = 1, **data: object) -> TrainConfig:
    reading = {"shuffle_window": 1, "threads": 1, "statistics_images": 3}
    return config(
        data=DataConfig(name="images", images=images, **(reading | data)),  # type: ignore[arg-type]
        split=SPLIT,
        batch_size=BATCH,
        trainer=TrainerConfig(STEPS, log_every=1, accelerator="cpu", devices=str(ranks)),
        strategy=StrategyConfig("ddp" if ranks > 1 else "single"),
        evaluation=EvaluationConfig(every=7, images=4),
        checkpoint=CheckpointConfig(every=1, keep=-1),
        resume="auto",
    )


def losses(run: Path, column: str = "train/loss") -> list[float]:
    return [float(row[column]) for row in read_rows(run / "metrics.csv") if row[column]]


@pytest.fixture(scope="module")
def store(tars: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "tokens"
    towers = {name: demo.load(name) for name in demo.NAMES}
    settings = ExtractConfig(images=tars, split=SPLIT, extract=EngineConfig(device="cpu"))
    extract(open_source(tars, 256), towers, folder, settings)
    return folder


@pytest.fixture(scope="module")
def straight(tars: str, tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """An undisturbed run that keeps its tokens in `keep` beside it."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(shared_home))
        run_training(wanted(tars, keep=str(folder / "keep")), folder / "run", [])
    return folder


def test_it_is_the_run_on_the_extracted_store_and_leaves_that_store(
    tars: str, store: Path, straight: Path, tmp_path: Path
) -> None:
    direct, stored = tmp_path / "direct", tmp_path / "stored"
    tokens = {"name": "tokens", "images": None, "tokens": str(store)}
    run_training(wanted(tars), direct, [])
    run_training(replace(wanted(tars), data=replace(wanted(tars).data, **tokens)), stored, [])
    for column in ("train/loss", "val/cosine"):
        kept = losses(straight / "run", column)
        assert kept == losses(stored, column)  # bit for bit
        assert kept == pytest.approx(losses(direct, column), abs=2e-3)  # fp16
    one, two = TokenStore.open(straight / "keep", "full"), TokenStore.open(store)
    assert one.index.splits == two.index.splits
    for split in one.index.splits:
        ids = np.arange(one.index.splits[split])
        ours, theirs = TokenReader(one, split), TokenReader(two, split)
        assert ours.keys(ids) == theirs.keys(ids)
        assert torch.equal(ours.read(ids)["target"], theirs.read(ids)["target"])
        assert ours.metadata(ids) == theirs.metadata(ids)
    assert {path.suffix for path in (straight / "keep").iterdir()} == {
        *(".tar", ".idx", ".json", ".jsonl", ".safetensors")
    }


def test_what_is_kept_is_evaluated(straight: Path) -> None:
    loaded = load(straight / "run")
    held, train = open_readers(loaded, EvaluateConfig(ckpt="run", device="cpu"))
    assert train is not None
    assert train.content_hash == loaded.facts["tokens"]["hash"]
    stored = TokenReader(TokenStore.open(straight / "keep"), "validation")
    ids = np.arange(len(stored))
    assert torch.equal(held.read(ids)["condition"], stored.read(ids)["condition"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_in_its_first_epoch_ends_as_an_undisturbed_one(
    tars: str, straight: Path, tmp_path: Path, ranks: int
) -> None:
    """Alone, while the ninth shard is written; two ranks in a save, where one then goes on."""
    folder, keep = tmp_path / "killed", tmp_path / "keep"
    at = Disturbance("/.train-", 17)
    if ranks == 2:
        at = Disturbance("step-00000003", 1, ranks=(1, 0))
    killed = run(folder, *[wanted(tars, ranks, keep=str(keep))] * ranks, planned=at)
    assert killed == [-9] * ranks, (folder / "said-0.txt").read_text()
    found, damaged = checkpointing.newest_to_resume(folder)
    assert damaged == []
    # The towers run ahead of the steps: the ninth shard may come before the first checkpoint.
    assert found is None or 0 < checkpointing.step_of(found) < 8
    assert not (keep / "index.json").exists()
    assert ranks == 2 or list(keep.glob(".train-*.tmp"))
    assert run(folder, wanted(tars, keep=str(keep))) == [0], (folder / "said-0.txt").read_text()
    kept = straight / "keep"
    files = sorted(path.name for path in kept.iterdir())
    assert sorted(path.name for path in keep.iterdir()) == files
    assert all((keep / name).read_bytes() == (kept / name).read_bytes() for name in files)
    if ranks == 1:
        assert_same_end(straight / "run", folder)
    assert losses(folder) == pytest.approx(losses(straight / "run"), rel=1e-5)


def test_int8(tars: str, straight: Path, tmp_path: Path) -> None:
    data = {"keep": str(tmp_path / "keep"), "keep_storage": "int8"}
    run_training(wanted(tars, **data), tmp_path / "run", [])
    assert losses(tmp_path / "run") == pytest.approx(losses(straight / "run"), abs=2e-2)
    kinds = {spec.dtype for spec in TokenIndex.load(tmp_path / "keep").arrays.values()}
    assert "int8" in kinds


def test_another_store_is_refused(tars: str, store: Path, straight: Path, tmp_path: Path) -> None:
    def refused(match: str, images: str = tars, **data: object) -> None:
        with pytest.raises(UserError, match=match) as caught:
            run_training(wanted(images, **data), tmp_path / "run", [])
        assert "\n" not in str(caught.value)

    other = "data.keep=.* holds a finished token store made with another"
    keep = str(straight / "keep")
    refused(f"{other} towers, captions, storage", keep=keep, keep_storage="bfloat16")
    refused(f"{other} images, content of images", tars.replace("0..9", "0..8"), keep=keep)
    with pytest.raises(UserError, match="data.keep=a stores the tokens of data=images"):
        DataConfig(name="demo", keep="a")
    resume = str(straight / "run" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match="trained on other data"):
        run_training(replace(wanted(tars), resume=resume), tmp_path / "run", [])


def test_pictures_that_change_under_a_run_are_refused(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(12):
        scene("train", number).image.save(photos / f"{number:02d}.png")
    settings = wanted(str(photos), keep=str(tmp_path / "keep"))
    kept = KeptShards(settings, "cpu")
    (photos / "03.png").write_bytes(b"no picture")
    match = r"have changed since they were looked at \(03.png: .*\): restore them"
    with pytest.raises(UserError, match=match):
        kept.hold(kept.index.shards[0])
    scene("train", 3).image.save(photos / "03.png")
    kept.hold(kept.index.shards[0]).close()
    assert TokenIndex.load(tmp_path / "keep").samples == 12


def test_a_full_disk_is_one_line_and_nothing_is_lost(
    tars: str, store: Path, tmp_path: Path
) -> None:
    """It fills while the fourth unit is made."""
    with small_disk(tmp_path / "disk", 12 << 20) as disk:
        keep = disk / "keep"
        kept = KeptShards(wanted(tars, keep=str(keep)), "cpu")
        part = kept.parts[3]

        def read() -> bytes | Image.Image:
            fill(disk)
            return item.read()

        item = part.items[2]
        assert isinstance(item, Item)
        part.items[2] = replace(item, read=read)
        tokens = TokenStore(keep, kept.index, "full", kept)
        entries = [entry for entry in kept.index.shards if entry.split == "train"]
        for number in range(3):
            tokens.shard(number)
        with pytest.raises(UserError, match=r"data\.keep=.*: the disk is full .*: free some") as it:
            tokens.shard(3)
        assert "\n" not in str(it.value)
        assert not list(keep.glob(".*.tmp"))
        (disk / "filler").unlink()
        part.items[2] = item
        for number in range(len(kept.index.shards)):
            tokens.shard(number)
        assert len(entries) > 3
        ours, theirs = (TokenReader(TokenStore.open(path), "train") for path in (keep, store))
        ids = np.arange(len(theirs))
        assert torch.equal(ours.read(ids)["target"], theirs.read(ids)["target"])
        small = wanted(tars, keep=str(disk / "another"))
        with pytest.raises(UserError, match=r"data\.keep=.* GB free, the tokens of 50 images take"):
            KeptShards(small, "cpu")
