"""Loaders: the same samples for every world and micro-batch, and exact resume under Lightning."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from small_store import sample, write_store

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.batches import BatchPlan, align_checkpoint, batch_plan
from blip3o_lit.tokens.reading.loader import TokenLoader, ValidationLoader, prefetch
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore

SAMPLES = 22
BATCH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path, SAMPLES, 7)
    return path


def loader(
    folder: Path,
    steps: int = 6,
    world: int = 1,
    rank: int = 0,
    micro: int | None = None,
    seed: int = 0,
    **options: int,
) -> TokenLoader:
    reader = TokenReader(TokenStore.open(folder), "train", mode=ModeConfig("cls_patch"))
    order = SampleOrder(seed, reader.shard_sizes, 2)
    return TokenLoader(reader, order, batch_plan(BATCH, micro, world), steps, rank, **options)


def who(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    return list(zip(batch["epoch"].tolist(), batch["sample"].tolist()))


def test_batches_hold_the_tokens_of_their_ids(folder: Path) -> None:
    for batch in loader(folder):
        expected = np.stack([sample(i)["clip"] for i in batch["sample"].tolist()])
        np.testing.assert_array_equal(batch["target"].numpy(), expected)


def test_epochs_follow_without_gap_or_repeat(folder: Path) -> None:
    seen = [pair for batch in loader(folder, steps=11) for pair in who(batch)]
    assert len(seen) == 4 * SAMPLES
    for epoch in range(4):
        assert sorted(i for e, i in seen if e == epoch) == list(range(SAMPLES))


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    write_store(tmp_path, 3, 0)
    seen = [pair for batch in loader(tmp_path, steps=3) for pair in who(batch)]
    assert sorted(seen) == [(e, i) for e in range(8) for i in range(3)]


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, None), (2, 2), (4, 1)])
def test_every_world_and_accumulation_sees_the_same_steps(
    folder: Path, world: int, micro: int | None
) -> None:
    reference = [who(batch) for batch in loader(folder)]
    ranks = [loader(folder, world=world, rank=r, micro=micro) for r in range(world)]
    parts = [[who(batch) for batch in rank] for rank in ranks]
    accumulation = BATCH // world // (micro or BATCH // world)
    assert all(len(part) == len(rank) == 6 * accumulation for part, rank in zip(parts, ranks))
    for step, expected in enumerate(reference):
        micros = slice(step * accumulation, (step + 1) * accumulation)
        assert [pair for part in parts for batch in part[micros] for pair in batch] == expected


@pytest.mark.parametrize("taken", [0, 1, 2, 3, 5])
def test_state_counts_what_was_taken_not_what_was_read_ahead(folder: Path, taken: int) -> None:
    whole = [who(batch) for batch in loader(folder)]
    first = loader(folder, threads=4)
    iterator = iter(first)
    for _ in range(taken):
        next(iterator)
    state = first.state_dict()
    assert (state["samples"], state["steps"]) == (taken * BATCH, taken)
    second = loader(folder, world=2, rank=1)
    second.load_state_dict(state)
    assert [who(batch) for batch in second] == [batch[BATCH // 2 :] for batch in whole[taken:]]
    assert len(second) == 6


def test_state_counts_whole_steps_alone(folder: Path) -> None:
    accumulating = loader(folder, micro=2)
    iterator = iter(accumulating)
    for _ in range(7):
        next(iterator)
    assert accumulating.state_dict()["samples"] == BATCH


def test_iterating_again_starts_again(folder: Path) -> None:
    one = loader(folder)
    iter(one)
    assert [who(batch) for batch in one] == [who(batch) for batch in one]


def test_other_seed_or_data_is_refused(folder: Path) -> None:
    state = loader(folder).state_dict()
    with pytest.raises(UserError, match="seed=0, this run seed=1"):
        loader(folder, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="other data"):
        loader(folder).load_state_dict(state | {"data": "x"})


def test_error_in_a_reader_thread_reaches_the_loop() -> None:
    def fail() -> dict[str, torch.Tensor]:
        raise UserError("sample cat is broken")

    def work() -> dict[str, torch.Tensor]:
        return {}

    batches = prefetch(lambda job: job(), [work, fail, work], threads=2)
    assert next(batches) == {}
    with pytest.raises(UserError, match="cat"):
        next(batches)


def test_the_order_is_computed_in_reader_threads(folder: Path) -> None:
    threads = set()

    class Order(SampleOrder):
        def at(self, position: int, count: int) -> tuple[np.ndarray, np.ndarray]:
            threads.add(threading.current_thread().name.partition("_")[0])
            return super().at(position, count)

    reader = TokenReader(TokenStore.open(folder), "train")
    order = Order(0, reader.shard_sizes, 2)
    assert len(list(TokenLoader(reader, order, batch_plan(BATCH, None, 1), 6))) == 6
    assert threads == {"tokens"}


def test_a_batch_is_freed_before_a_thread_is_woken_for_another(folder: Path) -> None:
    freed: list[bool] = []
    last: list[weakref.ref[torch.Tensor]] = []

    class Plan(BatchPlan):
        def offset(self, rank: int, micro: int) -> int:  # asked for before a thread gets the job
            freed.extend(ref() is None for ref in last)
            return super().offset(rank, micro)

    reader = TokenReader(TokenStore.open(folder), "train")
    order = SampleOrder(0, reader.shard_sizes, 2)
    batches = iter(TokenLoader(reader, order, Plan(BATCH, 1, BATCH), 8))
    for _ in range(8):
        last = [weakref.ref(next(batches)["target"])]
    assert freed == [True] * 4  # 3 jobs wait before the first batch, one is added with it


@pytest.mark.parametrize(("world", "batch_size"), [(1, 3), (2, 2), (3, 4), (1, 100), (4, 100)])
def test_validation_sees_each_sample_once(folder: Path, world: int, batch_size: int) -> None:
    reader = TokenReader(TokenStore.open(folder), "validation")
    ranks = [ValidationLoader(reader, batch_size, r, world) for r in range(world)]
    batches = [list(rank) for rank in ranks]
    assert len({len(part) for part in batches} | {len(rank) for rank in ranks}) == 1
    assert len({len(b["sample"]) for part in batches for b in part}) == 1
    seen = [i for part in batches for b in part for i in b["sample"][b["valid"]].tolist()]
    assert sorted(seen) == list(range(7))


class Probe(pl.LightningModule):
    """Records the samples of each optimizer step; one weight learns, so that steps are real."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[tuple[int, int]]]] = []

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step, who(batch)))
        return (self.weight - batch["target"].float().mean()).square()

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        align_checkpoint(checkpoint, self.trainer.accumulate_grad_batches)


def fit(
    folder: Path, out: Path, steps: int, micro: int | None, resume: Path | None = None
) -> Probe:
    data = TokenDataModule(
        DataConfig(name="tokens", tokens=str(folder)),
        ModeConfig("cls_patch"),
        folder,
        seed=0,
        batch_size=BATCH,
        micro_batch_size=micro,
        steps=steps,
    )
    data.open()
    accumulation = batch_plan(BATCH, micro, 1).accumulation
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulation,
        val_check_interval=accumulation * 2,
        check_val_every_n_epoch=None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[ModelCheckpoint(out, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    probe = Probe()
    trainer.fit(probe, datamodule=data, ckpt_path=resume, weights_only=True)
    assert trainer.global_step == steps
    return probe


def steps_of(probe: Probe) -> dict[int, list[tuple[int, int]]]:
    out: dict[int, list[tuple[int, int]]] = {}
    for step, pairs in probe.seen:
        out.setdefault(step, []).extend(pairs)
    return out


@pytest.mark.filterwarnings("ignore")
def test_resume_under_lightning(folder: Path, tmp_path: Path) -> None:
    """In mid-epoch, over an epoch's end, with another micro-batch size, and with more steps."""
    straight = fit(folder, tmp_path / "a", 8, 4)
    expected = steps_of(straight)
    assert list(expected) == list(range(8))
    assert all(len(pairs) == BATCH for pairs in expected.values())
    for start, micro in ((1, 4), (3, 4), (4, 2), (3, None)):
        checkpoint = tmp_path / "a" / f"step={start}.ckpt"
        resumed = fit(folder, tmp_path / f"b{start}{micro}", 8, micro, checkpoint)
        assert steps_of(resumed) == {s: expected[s] for s in range(start, 8)}
        torch.testing.assert_close(resumed.weight, straight.weight)
    short = fit(folder, tmp_path / "c", 3, 4)
    assert len(short.seen) == 6
    longer = fit(folder, tmp_path / "d", 8, 4, tmp_path / "c" / "step=3.ckpt")
    assert steps_of(longer) == {s: expected[s] for s in range(3, 8)}
    assert torch.equal(longer.weight, straight.weight)
