"""The data module: opening, limits, lengths, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_store import write_store

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.loader import ValidationLoader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path)
    return path


def module(folder: Path | str, steps: int | None = 4, **options: object) -> TokenDataModule:
    config = DataConfig(name="tokens", tokens=str(folder), **options)  # type: ignore[arg-type]
    return TokenDataModule(
        config, ModeConfig(), folder, seed=1, batch_size=6, micro_batch_size=3, steps=steps
    )


def test_open_needs_no_trainer(folder: Path) -> None:
    data = module(folder)
    data.open()
    assert (len(data.train), data.shape.condition.tokens) == (22, 16)
    assert data.validation is not None
    assert len(data.validation) == 7
    assert data.target_standardizer.mean_NC.shape == (16, 4)
    assert len(data.train_dataloader()) == len(list(data.train_dataloader())) == 8
    held_out = data.val_dataloader()
    assert isinstance(held_out, ValidationLoader)
    assert sum(int(batch["valid"].sum()) for batch in held_out) == 7


def test_limits(folder: Path) -> None:
    data = module(folder, max_shards=3, subset=12, validation_subset=4)
    data.open()
    assert data.validation is not None
    assert (len(data.train), len(data.validation)) == (12, 4)
    shards = module(folder, max_shards=2)
    shards.open()
    assert len(shards.train) == 10
    swapped = module(folder, condition="clip", target="eva")
    swapped.open()
    assert (swapped.shape.condition.width, swapped.shape.target.width) == (4, 6)


def test_steps(folder: Path) -> None:
    data = module(folder, steps=None)
    data.open()
    with pytest.raises(UserError, match="steps"):
        data.train_dataloader()
    assert data.steps_for(10, None) == data.steps == 10
    assert data.steps_for(10, 3) == 11
    assert data.steps_for(10, 2) == 8


def test_store_without_validation(tmp_path: Path) -> None:
    write_store(tmp_path, 5, 0)
    data = module(tmp_path)
    data.open()
    assert data.validation is None
    assert data.val_dataloader() == []


def test_missing_store(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no token store at"):
        module(tmp_path / "nowhere").open()
