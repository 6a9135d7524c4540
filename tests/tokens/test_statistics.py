"""Statistics against NumPy, merging, the cache, and the scaling's round trip."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import sample, write_store

from blip3o_lit.base.home import home
from blip3o_lit.base.shape import TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.statistics import (
    ChannelMoments,
    Standardizer,
    TokenMoments,
    cached_standardizers,
    moments_of,
    reader_batches,
    spread_ids,
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> TokenReader:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder)
    return TokenReader(TokenStore.open(folder), "train", mode=ModeConfig("cls_patch"))


def test_moments_equal_numpy(reader: TokenReader) -> None:
    found = moments_of(reader_batches(reader, 1000, 2), reader.shape)
    condition, target = found["condition"], found["target"]
    for moments, name in ((condition, "eva"), (target, "clip")):
        tokens = np.stack([sample(i)[name] for i in range(22)]).astype(np.float64)
        for part, rows in ((moments.cls, tokens[:, 0]), (moments.patch, tokens[:, 1:])):
            assert part is not None
            rows = rows.reshape(-1, tokens.shape[-1])
            assert part.count == len(rows)
            np.testing.assert_allclose(part.mean_C.numpy(), rows.mean(0), rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(part.std_C.numpy(), rows.std(0), rtol=1e-12)


def test_merging_equals_computing_at_once_even_far_from_zero() -> None:
    rows = torch.randn(1000, 5, dtype=torch.float64) + 1e6
    merged = ChannelMoments.of(rows[:1])
    for piece in (rows[1:64], rows[64:700], rows[700:]):
        merged = merged.merge(ChannelMoments.of(piece))
    assert merged.count == 1000
    torch.testing.assert_close(merged.mean_C, rows.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.std_C, rows.std(0, correction=0), rtol=1e-8, atol=0)


def test_any_number_of_threads_gives_the_same_bits(reader: TokenReader) -> None:
    first = moments_of(reader_batches(reader, 22, 1), reader.shape)
    second = moments_of(reader_batches(reader, 22, 4), reader.shape)
    for side in ("condition", "target"):
        assert torch.equal(first[side].patch.m2_C, second[side].patch.m2_C)


def test_round_trip_and_unit_scale(reader: TokenReader) -> None:
    moments = moments_of(reader_batches(reader, 22, 1), reader.shape)["condition"]
    standardizer = Standardizer.of(moments, reader.shape.condition)
    tokens = reader.read(np.arange(22))["condition"]
    scaled = standardizer.standardise(tokens)
    assert scaled.dtype == torch.float32
    for rows in (scaled[:, :1], scaled[:, 1:]):
        flat = rows.reshape(-1, 6)
        torch.testing.assert_close(flat.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
        torch.testing.assert_close(flat.std(0, correction=0), torch.ones(6), rtol=1e-5, atol=0)
    torch.testing.assert_close(standardizer.restore(scaled), tokens.float(), rtol=0, atol=1e-5)


def test_cls_and_patches_are_scaled_apart() -> None:
    shape = TokenShape((2, 2), True, 3)
    tokens = torch.randn(50, 5, 3)
    tokens[:, 0] = tokens[:, 0] * 100 + 7
    standardizer = Standardizer.of(TokenMoments.of(tokens, True), shape)
    assert standardizer.mean_NC.shape == (5, 3)
    assert (standardizer.std_NC[0] > 30 * standardizer.std_NC[1]).all()
    assert torch.equal(standardizer.std_NC[1], standardizer.std_NC[4])


def test_constant_channel_is_floored() -> None:
    tokens = torch.randn(100, 4, 3)
    tokens[..., 1] = 5.0
    shape = TokenShape((2, 2), False, 3)
    standardizer = Standardizer.of(TokenMoments.of(tokens, False), shape)
    scaled = standardizer.standardise(tokens)
    assert torch.equal(scaled[..., 1], torch.zeros(100, 4))
    assert standardizer.std_NC[0, 1] == pytest.approx(1e-3 * standardizer.std_NC[0].median())


def test_cache_is_used_and_depends_on_content(
    reader: TokenReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path))
    calls = []

    def batches() -> list[dict[str, torch.Tensor]]:
        calls.append(1)
        return list(reader_batches(reader, 22, 1))

    first = cached_standardizers(reader.content_hash, reader.shape, 22, batches)
    again = cached_standardizers(reader.content_hash, reader.shape, 22, batches)
    assert len(calls) == 1
    assert torch.equal(first["target"].std_NC, again["target"].std_NC)
    cached_standardizers("other", reader.shape, 22, batches)
    assert len(calls) == 2
    for file in (home() / "statistics").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="delete it"):
        cached_standardizers("other", reader.shape, 22, batches)


def test_of_many_processes_one_computes_and_the_others_wait(
    reader: TokenReader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BLIP3O_HOME", str(tmp_path))
    calls, all_there = [], threading.Barrier(4)

    def batches() -> list[dict[str, torch.Tensor]]:
        calls.append(1)
        return list(reader_batches(reader, 22, 1))

    def start(_: int) -> torch.Tensor:
        all_there.wait()
        return cached_standardizers(reader.content_hash, reader.shape, 22, batches)["target"].std_NC

    with ThreadPoolExecutor(4) as pool:  # a lock belongs to an open file, not to a process
        found = list(pool.map(start, range(4)))
    assert len(calls) == 1
    assert all(torch.equal(std_NC, found[0]) for std_NC in found)


def test_spread_ids_take_whole_shards_over_the_split() -> None:
    sizes = np.full(100, 10)
    ids = spread_ids(sizes, 50)
    assert len(ids) == len(set(ids.tolist())) == 50
    assert sorted(set((ids // 10).tolist())) == [0, 25, 50, 74, 99]
    assert spread_ids(sizes, 5000).tolist() == list(range(1000))
    assert len(spread_ids(sizes, 7)) == 7


def test_state_dict_restores_the_scale() -> None:
    standardizer = Standardizer(torch.randn(5, 3), torch.rand(5, 3) + 1)
    other = Standardizer.identity(TokenShape((2, 2), True, 3))
    other.load_state_dict(standardizer.state_dict())
    assert torch.equal(other.mean_NC, standardizer.mean_NC)
