"""Statistics against NumPy, merging, the cache, and the scaling's round trip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import sample, write_store

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.home import home
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.shape import TokenShape
from blip3o_lit.tokens.reader import TokenReader, TokenStore
from blip3o_lit.tokens.statistics import (
    ChannelMoments,
    Standardizer,
    TokenMoments,
    cached_standardizers,
    pair_moments,
    reader_batches,
    spread_ids,
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> TokenReader:
    folder = tmp_path_factory.mktemp("store")
    write_store(folder)
    return TokenReader(TokenStore.open(folder), "train", mode=ModeConfig("cls_patch"))


def test_moments_equal_numpy(reader: TokenReader) -> None:
    condition, target = pair_moments(reader_batches(reader, 1000, 2), reader.shape)
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
    first = pair_moments(reader_batches(reader, 22, 1), reader.shape)
    second = pair_moments(reader_batches(reader, 22, 4), reader.shape)
    for a, b in zip(first, second):
        assert torch.equal(a.patch.m2_C, b.patch.m2_C)


def test_round_trip_and_unit_scale(reader: TokenReader) -> None:
    moments, _ = pair_moments(reader_batches(reader, 22, 1), reader.shape)
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


def test_each_position_can_have_its_own_scale() -> None:
    shape = TokenShape((2, 2), True, 3)
    tokens = torch.randn(300, 5, 3) * torch.arange(1, 6)[:, None] + torch.arange(5)[:, None]
    pieces = [TokenMoments.of(tokens[:7], True, True), TokenMoments.of(tokens[7:], True, True)]
    moments = pieces[0].merge(pieces[1])
    patches = tokens[:, 1:].double()
    own = moments.patch.mean_C.view(4, 3), (moments.patch.m2_C / 300).sqrt().view(4, 3)
    torch.testing.assert_close(own[0], patches.mean(0))
    torch.testing.assert_close(own[1], patches.std(0, correction=0))
    standardizer = Standardizer.of(moments, shape)
    torch.testing.assert_close(standardizer.mean_NC[0], tokens[:, 0].mean(0))
    scaled = standardizer.standardise(tokens)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(5, 3), rtol=0, atol=0.05)
    torch.testing.assert_close(scaled.std(0, correction=0), torch.ones(5, 3), rtol=0, atol=0.05)
    torch.testing.assert_close(standardizer.restore(scaled), tokens, rtol=0, atol=1e-5)


@pytest.mark.parametrize("images", [2, 8, 64])
def test_positions_that_differ_by_chance_alone_share_one_scale(images: int) -> None:
    shape = TokenShape((16, 16), False, 3)
    tokens = torch.randn(images, 256, 3, generator=torch.Generator().manual_seed(images))
    shared = Standardizer.of(TokenMoments.of(tokens, False), shape)
    own = Standardizer.of(TokenMoments.of(tokens, False, True), shape)
    raw_error = (tokens.mean(0) - shared.mean_NC).square().mean()
    assert (own.mean_NC - shared.mean_NC).square().mean() < 0.25 * raw_error
    assert (own.std_NC / shared.std_NC - 1).square().mean().sqrt() < 0.15
    # and where they differ by more than chance, their own means come through
    moved = tokens + 5 * torch.randn(256, 3)
    own = Standardizer.of(TokenMoments.of(moved, False, True), shape)
    torch.testing.assert_close(own.mean_NC, moved.mean(0), rtol=0, atol=0.4)


def test_one_image_has_the_scale_of_its_channels() -> None:
    shape, tokens = TokenShape((4, 4), False, 3), torch.randn(1, 16, 3)
    shared = Standardizer.of(TokenMoments.of(tokens, False), shape)
    own = Standardizer.of(TokenMoments.of(tokens, False, True), shape)
    torch.testing.assert_close(own.mean_NC, shared.mean_NC)
    torch.testing.assert_close(own.std_NC, shared.std_NC)


def test_a_position_that_never_changes_is_not_blown_up() -> None:
    tokens = torch.randn(50, 16, 3)
    tokens[:, 0] = 1.0
    own = Standardizer.of(TokenMoments.of(tokens, False, True), TokenShape((4, 4), False, 3))
    assert (own.std_NC[0] > 0.1).all()


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
    assert torch.equal(first[1].std_NC, again[1].std_NC)
    own, _ = cached_standardizers(reader.content_hash, reader.shape, 22, batches, by_position=True)
    assert not torch.equal(own.mean_NC, first[0].mean_NC)
    again, _ = cached_standardizers(reader.content_hash, reader.shape, 22, batches, True)
    assert torch.equal(own.mean_NC, again.mean_NC)
    assert len(calls) == 2
    cached_standardizers("other", reader.shape, 22, batches)
    assert len(calls) == 3
    for file in (home() / "statistics").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match="delete it"):
        cached_standardizers("other", reader.shape, 22, batches)


def test_spread_ids_take_whole_shards_over_the_split() -> None:
    sizes = np.full(100, 10)
    ids = spread_ids(sizes, 50)
    assert len(ids) == len(set(ids.tolist())) == 50
    assert sorted(set((ids // 10).tolist())) == [0, 25, 50, 74, 99]
    assert spread_ids(sizes, 5000).tolist() == list(range(1000))
    assert len(spread_ids(sizes, 7)) == 7


def test_state_dict_restores_the_scale() -> None:
    standardizer = Standardizer(torch.randn(5, 3), torch.rand(5, 3) + 1)
    other = Standardizer.like(TokenShape((2, 2), True, 3))
    other.load_state_dict(standardizer.state_dict())
    assert torch.equal(other.mean_NC, standardizer.mean_NC)
