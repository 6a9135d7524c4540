"""Several stores as one: exact shares, an order that is a function, equal statistics, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import ARRAYS, CLIP, sample

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.batches import BatchPlan
from blip3o_lit.tokens.reading.loader import TokenLoader
from blip3o_lit.tokens.reading.mixed_order import MixedOrder, interleaved
from blip3o_lit.tokens.reading.mixture import MixedReader, shares
from blip3o_lit.tokens.reading.order import SampleOrder
from blip3o_lit.tokens.reading.store_set import StoreSet
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as
from blip3o_lit.tokens.store.shards import TokenWriter

MODE = ModeConfig("cls_patch")


def write(folder: Path, first: int, train: int, validation: int, arrays=ARRAYS, size=5) -> Path:
    with TokenWriter(folder, arrays, size) as writer:
        for place in range(train + validation):
            split, number = "train" if place < train else "validation", first + place
            writer.add(split, f"{number}", sample(number, arrays), f"{number}")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("stores")
    return str(write(folder / "a", 0, 22, 5)), str(write(folder / "b", 100, 9, 3, size=4))


def mixed(stores, split="train", **options) -> MixedReader:
    reader = StoreSet(stores, DataConfig()).reader(
        split, "eva", "clip", MODE, weighted=True, **options
    )
    assert isinstance(reader, MixedReader)
    return reader


def module(stores, steps: int = 4, **options) -> TokenDataModule:
    data = TokenDataModule(DataConfig(**options), MODE, stores, 1, 6, 3, steps)
    data.open()
    return data


def numbers(reader: MixedReader, ids: np.ndarray) -> list[int]:
    return [int(caption) for caption in reader.captions(ids)]


@pytest.mark.parametrize("counts", [[22, 9], [1, 30], [30, 1], [7, 7, 7], [1, 2, 97, 13]])
def test_places_are_shared_out_evenly_and_exactly(counts):
    total = sum(counts)
    found, before = interleaved(np.array(counts), 0, total)
    for number, count in enumerate(counts):
        places = np.flatnonzero(found == number)
        assert before[places].tolist() == list(range(count))
        ideal = np.arange(1, total + 1) * count / total
        assert np.abs(np.cumsum(found == number) - ideal).max() < len(counts)
    some, _ = interleaved(np.array(counts), 5, total - 9)
    assert np.array_equal(some, found[5 : total - 4])


def test_shares_add_up():
    assert shares(np.array([0.7, 0.3]), 31).tolist() == [22, 9]
    assert shares(np.array([1.0, 1.0, 1.0]), 31).tolist() == [11, 10, 10]


def test_without_weights_every_sample_comes_once_an_epoch(pair):
    reader = mixed(dict.fromkeys(pair))
    order = MixedOrder(3, reader, 2)
    for epoch in range(3):
        ids, epochs = order.at(31 * epoch, 31)
        assert sorted(ids) == list(range(31))
        assert set(epochs) == {epoch}
    pieces = [order.at(position, 7)[0] for position in range(0, 63, 7)]
    assert np.concatenate(pieces).tolist() == order.at(0, 63)[0].tolist()
    reverse = mixed(dict.fromkeys(reversed(pair)))
    assert reverse.content_hash == reader.content_hash


def test_weights_give_exact_counts_and_further_epochs_of_the_smaller_store(pair):
    reader = mixed({pair[0]: 1, pair[1]: 2})
    small = next(n for n, one in enumerate(reader.readers) if len(one) == 9)
    assert reader.counts[small] == 21
    order = MixedOrder(3, reader, 2)
    own = []
    for epoch in range(3):
        ids, epochs = order.at(31 * epoch, 31)
        of = reader.numbers(ids) == small
        assert of.sum() == 21
        own += list(zip(epochs[of].tolist(), ids[of].tolist()))
    assert len(own) == 63
    assert len(set(own)) == 63
    for epoch in range(7):
        assert sum(e == epoch for e, _ in own) == 9


def test_batches_have_the_right_tokens_in_the_right_places(pair):
    reader = mixed(dict.fromkeys(pair))
    ids = np.random.default_rng(0).permutation(31)
    batch = reader.read(ids)
    for row, number in enumerate(numbers(reader, ids)):
        assert np.array_equal(batch["condition"][row].numpy(), sample(number)["eva"])
        assert np.array_equal(batch["target"][row].numpy(), sample(number)["clip"])
    text = reader.text(ids)
    assert text is not None
    assert reader.keys(ids) == [str(number) for number in numbers(reader, ids)]
    assert text.shape == (31, 5)


def test_a_store_twice_is_itself(pair, tmp_path):
    write(tmp_path / "copy", 0, 22, 5)
    alone, twice = module(pair[0]), module({pair[0]: 0.4, str(tmp_path / "copy"): 2})
    assert alone.train.content_hash == twice.train.content_hash
    assert alone.facts["hash"] == twice.facts["hash"]
    for one, two in zip(alone.train_dataloader(), twice.train_dataloader()):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_ranks_and_a_resumption_read_the_same_samples(pair):
    data = module({pair[0]: 1, pair[1]: 2}, steps=12)
    order = MixedOrder(1, data.train, data.data.shuffle_window)
    loader = data.train_dataloader()
    taken = [batch["sample"].tolist() for batch in loader]
    assert sum(taken, []) == order.at(0, 72)[0].tolist()
    resumed = data.train_dataloader()
    resumed.load_state_dict({**loader.state_dict(), "steps": 5, "samples": 30})
    assert sum((b["sample"].tolist() for b in resumed), []) == order.at(30, 42)[0].tolist()
    ranks = [
        [b["sample"].tolist() for b in TokenLoader(data.train, order, BatchPlan(6, 2, 3), 4, rank)]
        for rank in (0, 1)
    ]
    assert sum((one + two for one, two in zip(*ranks)), []) == order.at(0, 24)[0].tolist()
    other = module({pair[0]: 1, pair[1]: 3}).train_dataloader()
    with pytest.raises(UserError, match="other data"):
        other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize("weights", [(None, None), (1.0, 2.0)])
def test_statistics_are_those_of_an_epoch(pair, weights):
    data = module(dict(zip(pair, weights)))
    reader = data.train
    assert isinstance(reader, MixedReader)
    tokens = reader.read(np.arange(len(reader)))["target"].double()[:, 1:]
    sizes = [len(one) for one in reader.readers]
    share = np.repeat(reader.counts / sizes, sizes)
    weight_B11 = torch.from_numpy(share)[:, None, None] / (share.sum() * tokens.shape[1])
    mean = (tokens * weight_B11).sum((0, 1))
    std = ((tokens - mean).square() * weight_B11).sum((0, 1)).sqrt()
    scales = data.target_standardizer
    for found, expected in ((scales.mean_NC[1], mean), (scales.std_NC[1], std)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_limits_are_shared_by_the_stores(pair):
    data = module(dict.fromkeys(pair), validation_subset=4)
    assert isinstance(data.validation, MixedReader)
    assert [len(one) for one in data.validation.readers] == [2, 2]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"tower": "other"}, "tower of clip is (clip-test|other) in .* and (clip-test|other) in"),
        ({"layer": 3}, "layer of clip"),
        ({"shape": (17, 6)}, "shape of clip"),
        ({"normed": True}, "normed of clip"),
    ],
)
def test_unequal_stores_are_refused_by_the_difference(pair, tmp_path, change, says):
    arrays = {**ARRAYS, "clip": replace(CLIP, **change)}
    other = str(write(tmp_path / "other", 50, 5, 0, arrays))
    with pytest.raises(UserError, match=says):
        module({pair[0]: None, other: None})


def test_int8_and_fp16_stores_mix(pair, tmp_path):
    copy_as(TokenStore.open(pair[1]), tmp_path / "int8", "int8")
    reader = mixed({pair[0]: None, str(tmp_path / "int8"): None})
    tokens = reader.read(np.arange(31))["condition"]
    assert tokens.dtype == torch.float16
    for row, number in enumerate(numbers(reader, np.arange(31))):
        assert np.abs(tokens[row].numpy() - sample(number)["eva"]).max() < 0.3


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([], "give a folder"),
        ({"a": 0}, "weight of a is 0"),
        ({"a": True}, "weight of a is True"),
        ({"a": float("nan")}, "weight of a is nan"),
        ([1], "give a folder"),
        (3, "give a folder"),
    ],
)
def test_the_key_refuses_what_is_no_store(tokens, says):
    with pytest.raises(UserError, match=says):
        DataConfig(name="tokens", tokens=tokens)


def test_a_store_in_a_mixture_keeps_its_own_order(pair):
    reader = mixed(dict.fromkeys(pair))
    own = SampleOrder(3, reader.readers[0].shard_sizes, 2)
    ids, _ = MixedOrder(3, reader, 2).at(0, 31)
    first = ids[reader.numbers(ids) == 0]
    assert first.tolist() == own.at(0, len(first))[0].tolist()
