"""Training straight from pictures: the run on their fp32 store, and one line for what changed."""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from disturbed import run
from quick_run import config, differences, state

from blip3o_lit.budget.pictures import TwoWays
from blip3o_lit.checkpoints.load import load
from blip3o_lit.checkpoints.metrics_csv import read_rows
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import EngineConfig, ExtractConfig, SplitConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.config.trainer import (
    CheckpointConfig,
    EvaluationConfig,
    StrategyConfig,
    TrainerConfig,
)
from blip3o_lit.evaluation.readers import open_readers
from blip3o_lit.extraction.direct.datamodule import PictureDataModule
from blip3o_lit.extraction.direct.store import PictureReader, PictureStore
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import scene
from blip3o_lit.training.run import run_training

SPLIT = SplitConfig(by="content", fraction=0.3)
STEPS = 6


def draw(folder: Path, count: int = 21) -> Path:
    folder.mkdir()
    for number in range(count):
        scene("train", number).image.save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    (folder / "07.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures") / "photos")


@pytest.fixture(scope="module")
def store(photos: Path) -> Path:
    towers = {name: demo.load(name) for name in demo.NAMES}
    settings = ExtractConfig(
        images=str(photos), storage="float32", split=SPLIT, extract=EngineConfig(device="cpu")
    )
    extract(open_source(str(photos), 256), towers, photos.parent / "tokens", settings)
    return photos.parent / "tokens"


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, shared_home: Path) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(shared_home))


def run_config(
    images: Path | str | None = None, tokens: Path | None = None, **changes
) -> TrainConfig:
    data = DataConfig(name="tokens", tokens=str(tokens))
    if images is not None:
        data = DataConfig(name="images", images=str(images))
    base = config(
        data=data,
        split=SPLIT,
        batch_size=8,
        trainer=TrainerConfig(max_steps=STEPS, log_every=1, accelerator="cpu"),
        evaluation=EvaluationConfig(every=STEPS, images=4),
        checkpoint=CheckpointConfig(every=3, keep=-1),
    )
    return replace(base, **changes)


def column(run: Path, name: str) -> list[float]:
    return [float(row[name]) for row in read_rows(run / "metrics.csv") if row[name]]


@pytest.fixture(scope="module")
def direct(photos: Path, tmp_path_factory: pytest.TempPathFactory, shared_home: Path) -> Path:
    """A run on pictures, in one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP3O_HOME", str(shared_home))
        run_training(run_config(images=photos), photos.parent / "direct", [])
    return photos.parent / "direct"


def test_a_run_on_pictures_is_the_run_on_their_store_and_resumes(photos, store, direct, tmp_path):
    stored, resumed = tmp_path / "stored", tmp_path / "resumed"
    run_training(run_config(tokens=store), stored, [])
    assert len(column(direct, "train/loss")) == STEPS
    for name in ("train/loss", "val/cosine"):
        assert column(direct, name) == pytest.approx(column(stored, name), abs=1e-4)
    resume = str(direct / "checkpoints" / "step-00000003.ckpt")  # in mid-epoch
    run_training(run_config(images=photos, resume=resume), resumed, [])
    ends = [state(run / "checkpoints" / f"step-{STEPS:08d}.ckpt") for run in (direct, resumed)]
    for end in ends:
        end.pop("callbacks")
    assert differences(*ends) == []

    held, train = open_readers(load(direct), EvaluateConfig(ckpt=str(direct), device="cpu"))
    assert train is not None
    assert train.content_hash == load(direct).facts["tokens"]["hash"]
    other = TokenReader(TokenStore.open(store), "validation")
    ids = np.arange(len(held))
    assert np.allclose(held.read(ids)["target"], other.read(ids)["target"], atol=1e-4)

    changed = draw(tmp_path / "photos", 20)
    with pytest.raises(UserError, match=r"the images of .* have changed since"):
        run_training(run_config(images=changed, resume=resume), tmp_path / "other", [])


def test_two_ranks_go_on_with_the_run_of_one(photos, direct, tmp_path):
    """From a checkpoint in mid-epoch, with the same global batch."""
    resume = str(direct / "checkpoints" / "step-00000003.ckpt")
    trainer = TrainerConfig(STEPS, log_every=1, accelerator="cpu", devices="2")
    strategy = StrategyConfig("ddp")
    two = run_config(images=photos, resume=resume, trainer=trainer, strategy=strategy)
    assert run(tmp_path / "two", two, two) == [0, 0], (tmp_path / "two/said-0.txt").read_text()
    for name in ("train/loss", "val/cosine"):
        assert column(tmp_path / "two", name) == pytest.approx(column(direct, name), rel=1e-5)


def test_ranks_read_the_very_tokens_of_one_process(photos, direct):
    """Bit for bit, where the towers take one image at a time."""
    plain = run_config(images=photos)
    plain.data.tower_batch = 1
    data = PictureDataModule(plain)
    data.open()
    data.steps = STEPS
    saved = state(direct / "checkpoints" / "step-00000003.ckpt")["data"][0]

    def batches(world: int) -> list[list[dict[str, torch.Tensor]]]:
        ranks = []
        for rank in range(world):
            loader = data.train_dataloader()
            loader.rank, loader.plan = rank, BatchPlan(8, world, 8 // world)
            loader.load_state_dict(saved)
            ranks.append([data.encoded(batch) for batch in loader])
        return ranks

    (one,), two = batches(1), batches(2)
    assert len(one) == STEPS - 3
    for whole, *parts in zip(one, *two):
        for key, tensor in whole.items():
            assert torch.equal(tensor, torch.cat([part[key] for part in parts])), key


@pytest.mark.parametrize("mode", ["patch_only", "cls_patch", "grid_64"])
def test_pictures_have_the_ids_splits_and_views_of_their_store(photos, store, mode):
    view = ModeConfig(mode, projected=mode == "grid_64")
    pictures = PictureStore(run_config(images=photos), "cpu")
    tokens = TokenStore.open(store)
    assert pictures.index.splits == tokens.index.splits
    for split in ("train", "validation"):
        one, two = PictureReader(pictures, split, mode=view), TokenReader(tokens, split, mode=view)
        ids = np.arange(len(two))[::-1]
        assert one.keys(ids) == two.keys(ids)
        assert one.captions(ids) == two.captions(ids)
        assert one.shape == two.shape
        for side, expected in two.read(ids).items():
            assert np.allclose(one.read(ids)[side], expected, atol=2e-4)


def test_towers_take_their_own_batch(photos):
    plain, small = run_config(images=photos), run_config(images=photos)
    small.data.tower_batch = 3
    ids = np.arange(8)
    tokens = [PictureReader(PictureStore(c, "cpu"), "train").read(ids) for c in (plain, small)]
    assert np.allclose(tokens[0]["condition"], tokens[1]["condition"], atol=1e-5)


def test_a_plan_reads_no_picture(photos, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no picture")
    data = PictureDataModule(run_config(images=tmp_path))
    data.open(statistics=False)
    assert len(data.train) == 3
    assert data.shape.target.width == 128
    with pytest.raises(UserError, match="4 of 4 images can't be read; the first is 0.png"):
        data.open()


def test_what_cannot_be_trained_on_is_refused(photos, tmp_path):
    with pytest.raises(UserError, match="belong together"):
        DataConfig(name="images")
    with pytest.raises(UserError, match="belong together"):
        DataConfig(name="images", images="a", tokens="b")
    gone = draw(tmp_path / "photos", 12)
    reader = PictureReader(PictureStore(run_config(images=gone), "cpu"), "train")
    (gone / reader.metadata(np.arange(1))[0]["source"]).unlink()
    with pytest.raises(UserError, match="can't be read any more"):
        reader.read(np.arange(1))


def test_the_cheaper_way():
    ways = TwoWays(4e12, 0.13e12, images=100, seen=1000, store_bytes=200.0, disk=500.0)
    assert (ways.cheaper, ways.storage) == ("store", "float16")
    assert ways.direct - ways.by_store == pytest.approx(900 * 4e12)
    assert ways.by_keeping == ways.by_store
    assert replace(ways, seen=60).by_keeping == replace(ways, seen=60).direct
    assert replace(ways, disk=150.0).storage == "int8"
    assert replace(ways, disk=50.0).cheaper == "images"
    assert replace(ways, seen=60).cheaper == "images"


def test_tars_are_read_in_any_order(photos, tmp_path):
    names = sorted(path.name for path in photos.iterdir())
    for number, part in enumerate((names[:20], names[20:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for name in part:
                archive.add(photos / name, name)
    source = str(tmp_path / "{0..1}.tar")
    towers = {name: demo.load(name) for name in demo.NAMES}
    engine = EngineConfig(device="cpu")
    settings = ExtractConfig(images=source, storage="float32", split=SPLIT, extract=engine)
    extract(open_source(source, 256), towers, tmp_path / "tokens", settings)
    tokens = TokenStore.open(tmp_path / "tokens")
    pictures = PictureStore(run_config(images=Path(source)), "cpu")
    assert pictures.index.splits == tokens.index.splits
    one, two = PictureReader(pictures, "train"), TokenReader(tokens, "train")
    ids = np.random.default_rng(0).permutation(len(two))
    assert one.keys(ids) == two.keys(ids)
    assert one.captions(ids) == two.captions(ids)
    assert np.allclose(one.read(ids)["target"], two.read(ids)["target"], atol=2e-4)
    with pytest.raises(UserError, match="is behind an address"):
        PictureStore(run_config(images="file:///a.tar"), "cpu")
