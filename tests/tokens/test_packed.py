"""int8 tokens restored on the device: the bits that the reader restores, and the same loss."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from small_store import int8_tokens, write_int8, write_store

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.packed import Batch, PackedBatch, PackedTokens, restored
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as
from blip3o_lit.tokens.store.int8 import dequantise, load_scales

CPU = torch.device("cpu")
IDS = np.array([39, 3, 3, 17])
MODES = ["cls_patch", "patch_only"]


def by_numpy(folder: Path, stored: PackedTokens, first: int) -> np.ndarray:
    """What int8 stands for: product by product in fp32, then fp16."""
    scale_NC = load_scales(folder, TokenStore.open(folder).index.arrays)["eva"][first:]
    out = stored.stored_BNC.numpy().astype(np.float32) * scale_NC
    if stored.token_BN is not None:
        out = out * stored.token_BN.numpy()[..., None]
    return out.astype(np.float16)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["channel", "token"])
def test_packed_tokens_restore_to_the_reader_s_bits(tmp_path: Path, kind: str, mode: str) -> None:
    write_int8(tmp_path, int8_tokens(kind))
    reader = TokenReader(TokenStore.open(tmp_path), "train", mode=ModeConfig(mode))
    packed, plain = reader.read_packed(IDS), reader.read(IDS)
    stored = packed["condition"]
    assert isinstance(stored, PackedTokens)
    assert stored.stored_BNC.dtype == torch.int8
    assert (stored.token_BN is None) == (kind == "channel")
    expected = by_numpy(tmp_path, stored, int(mode == "patch_only"))
    np.testing.assert_array_equal(stored.to(CPU).restore().numpy(), expected)
    np.testing.assert_array_equal(plain["condition"].numpy(), expected)
    assert torch.equal(restored(packed)["target"], plain["target"])


@pytest.mark.parametrize("by_token", [False, True])
def test_pieces_give_the_bits_of_the_whole(by_token: bool) -> None:
    """Wide tokens, restored in pieces whose last one is shorter."""
    generator = torch.Generator().manual_seed(0)
    stored = torch.randint(-127, 128, (2, 19, 4096), dtype=torch.int8, generator=generator)
    scale, token = torch.rand(19, 4096, generator=generator), torch.rand(2, 19, generator=generator)
    whole = stored * scale * token[..., None] if by_token else stored * scale
    assert torch.equal(dequantise(stored, scale, token if by_token else None), whole.half())


def test_all_that_travels_is_page_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU nothing can be pinned: what is asked for is recorded instead."""
    write_int8(tmp_path, int8_tokens("token"))
    reader = TokenReader(TokenStore.open(tmp_path), "train", mode=ModeConfig("cls_patch"))
    asked: list[tuple[int, ...]] = []
    empty = torch.empty

    def record(shape: tuple[int, ...], pin_memory: bool = False, **options: object) -> torch.Tensor:
        asked.extend([tuple(shape)] if pin_memory else [])
        return empty(shape, **options)  # type: ignore[call-overload]

    def pin(self: torch.Tensor) -> torch.Tensor:
        asked.append(tuple(self.shape))
        return self

    monkeypatch.setattr(torch, "empty", record)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    reader.read_packed(IDS, pin=True)
    assert sorted(asked) == [(2, 32), (4, 17), (4, 17, 32), (4, 17, 32)]
    asked.clear()
    reader.read(IDS)
    assert asked == []


class Recorder(pl.LightningModule):
    """A linear map with the losses and batches it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.map = torch.nn.Linear(6, 4)
        torch.nn.init.constant_(self.map.weight, 0.1)
        torch.nn.init.zeros_(self.map.bias)
        self.losses: list[torch.Tensor] = []
        self.batches: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        self.batches.append(batch)
        loss = (self.map(batch["condition"].float()) - batch["target"].float()).square().mean()
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data: TokenDataModule) -> Recorder:
    recorder = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(recorder, datamodule=data)
    return recorder


@pytest.mark.filterwarnings("ignore")
def test_training_steps_are_those_of_tokens_restored_by_the_reader(tmp_path: Path) -> None:
    write_store(tmp_path / "fp16")
    folder = tmp_path / "int8"
    copy_as(TokenStore.open(tmp_path / "fp16"), folder, "int8")

    def data() -> TokenDataModule:
        config = DataConfig(name="tokens", tokens=str(folder))
        return TokenDataModule(config, ModeConfig(), folder, seed=1, batch_size=6, steps=3)

    handed_over = data()
    handed_over.open()
    first = next(iter(handed_over.train_dataloader()))
    assert isinstance(first["condition"], PackedTokens)
    on_device = fit(handed_over)

    class Restoring(TokenReader):
        def read_packed(self, ids: np.ndarray, pin: bool = False) -> PackedBatch:
            return {**restored(super().read_packed(ids, pin))}

    restoring = data()
    restoring.open()
    restoring.train = Restoring(TokenStore.open(folder), "train")
    restoring.validation = Restoring(TokenStore.open(folder), "validation")
    in_reader = fit(restoring)
    assert len(on_device.losses) == 3
    assert torch.equal(torch.stack(on_device.losses), torch.stack(in_reader.losses))
    assert len(on_device.batches) == len(in_reader.batches) == 3 + 2
    for one, other in zip(on_device.batches, in_reader.batches):
        assert one["condition"].dtype == one["target"].dtype == torch.float16
        assert all(torch.equal(one[key], other[key]) for key in one)
