"""int8 and bf16 stores: bounds of the error, the choice of scale, and the same arrays read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import int8_tokens, write_int8, write_store

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as

CLS_PATCH = ModeConfig("cls_patch")


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_the_better_scale_is_chosen_and_its_cost_is_true(tmp_path: Path, kind: str) -> None:
    value = int8_tokens(kind)
    index = write_int8(tmp_path, value)
    spec = index.arrays["eva"]
    assert (spec.dtype, spec.scale) == ("int8", kind)
    assert ("eva_scale" in index.arrays) == (kind == "token")
    reader = TokenReader(TokenStore.open(tmp_path), "train", mode=CLS_PATCH)
    back = reader.read(np.arange(40))["condition"]
    assert back.dtype == torch.float16
    measured = torch.cosine_similarity(back.double(), torch.from_numpy(value).double(), dim=-1)
    assert spec.cosine == pytest.approx(float(measured.mean()), abs=1e-9)
    assert 0.9999 < spec.cosine < 1.0


def test_error_is_at_most_half_a_level(tmp_path: Path) -> None:
    value = int8_tokens("channel")
    write_int8(tmp_path, value)
    reader = TokenReader(TokenStore.open(tmp_path), "train", mode=CLS_PATCH)
    back = reader.read(np.arange(40))["condition"].numpy().astype(np.float32)
    for rows in (slice(0, 1), slice(1, 17)):
        level = np.abs(value[:, rows]).max((0, 1)) / 127
        slack = 2**-11 * np.abs(value[:, rows])
        assert (np.abs(back - value)[:, rows] <= 0.5001 * level + slack).all()


def test_patches_alone_and_any_order(tmp_path: Path) -> None:
    write_int8(tmp_path, int8_tokens("token"))
    store = TokenStore.open(tmp_path)
    whole = TokenReader(store, "train", mode=CLS_PATCH).read(np.arange(40))["condition"]
    ids = np.array([39, 3, 3, 17])
    some = TokenReader(store, "train").read(ids)["condition"]
    assert torch.equal(some, whole[ids][:, 1:])


def test_missing_and_foreign_scales(tmp_path: Path) -> None:
    write_int8(tmp_path / "a", int8_tokens("channel"))
    write_int8(tmp_path / "b", int8_tokens("channel") * 2)
    file = tmp_path / "a" / "scales.safetensors"
    file.write_bytes((tmp_path / "b" / "scales.safetensors").read_bytes())
    with pytest.raises(UserError, match="other scales for eva"):
        TokenReader(TokenStore.open(tmp_path / "a"), "train").read(np.array([0]))
    file.unlink()
    with pytest.raises(UserError, match=r"scales.safetensors is missing"):
        TokenReader(TokenStore.open(tmp_path / "a"), "train").read(np.array([0]))


@pytest.mark.parametrize(("storage", "cosine"), [("bfloat16", 0.99999), ("int8", 0.9995)])
def test_recoding_a_store(tmp_path: Path, storage: str, cosine: float) -> None:
    write_store(tmp_path / "old")
    (tmp_path / "old" / "heads.safetensors").write_bytes(b"heads")
    index = copy_as(TokenStore.open(tmp_path / "old"), tmp_path / "new", storage)
    assert index.splits == {"train": 22, "validation": 7}
    assert (tmp_path / "new" / "heads.safetensors").read_bytes() == b"heads"
    for split in index.splits:
        old = TokenReader(TokenStore.open(tmp_path / "old"), split, mode=CLS_PATCH)
        new = TokenReader(TokenStore.open(tmp_path / "new"), split, mode=CLS_PATCH)
        ids = np.arange(len(old))
        assert (new.keys(ids), new.metadata(ids)) == (old.keys(ids), old.metadata(ids))
        a, b = old.read(ids)["target"].double(), new.read(ids)["target"].double()
        assert torch.cosine_similarity(a, b, dim=-1).mean() > cosine
        texts = old.text(ids), new.text(ids)
        assert texts[0] is not None
        assert texts[1] is not None
        assert torch.equal(*texts)
