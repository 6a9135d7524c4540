"""The reader gives back what was written, in any order, and names the place of every damage."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import ARRAYS, sample, write_store

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import OPEN_SHARDS, TokenStore
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.shards import ArraySpec, TokenWriter
from blip3o_lit.tokens.store.storage import finite

CLS_PATCH = ModeConfig("cls_patch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store for the tests that do not damage it."""
    path = tmp_path_factory.mktemp("store")
    write_store(path)
    return path


def reader(folder: Path, split: str = "train", verify: str = "size", **options: int) -> TokenReader:
    return TokenReader(TokenStore.open(folder, verify), split, mode=CLS_PATCH, **options)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 21), min_size=1, max_size=40))
def test_any_ids_in_any_order(folder: Path, ids: list[int]) -> None:
    batch = reader(folder).read(np.array(ids))
    for side, name in (("condition", "eva"), ("target", "clip")):
        expected = np.stack([sample(i)[name] for i in ids])
        assert batch[side].dtype == torch.float16
        np.testing.assert_array_equal(batch[side].numpy(), expected)


def test_no_samples_are_an_empty_batch(folder: Path) -> None:
    batch = reader(folder).read(np.arange(0))
    assert batch["condition"].shape == (0, *sample(0)["eva"].shape)
    assert batch["target"].shape == (0, *sample(0)["clip"].shape)


def test_offsets_behind_the_end_of_a_shard_are_refused(folder: Path) -> None:
    """One byte alone would be spread over the whole sample."""
    shard = TokenStore.open(folder, "size").shard(0)
    shard.offsets = shard.offsets.copy()
    shard.offsets[0, 0] = shard.entry.bytes - 1
    with pytest.raises(UserError, match=r"points behind the end of train-.*doctor"):
        shard.content("eva", 0, 0, 64)


def test_second_split_text_keys_and_captions(folder: Path) -> None:
    held_out = reader(folder, "validation")
    ids = np.array([6, 0])
    assert len(held_out) == 7
    assert held_out.keys(ids) == ["000028", "000022"]
    assert held_out.captions(ids) == ["caption 28", "caption 22"]
    assert held_out.metadata(ids)[0]["source"] == "image 28"
    text = held_out.text(ids)
    assert text is not None
    expected = np.stack([sample(i)["text"] for i in (28, 22)]).astype(np.float32)
    np.testing.assert_array_equal(text.numpy(), expected)


def test_store_without_text_gives_none(tmp_path: Path) -> None:
    write_store(tmp_path, 3, 0, arrays={k: ARRAYS[k] for k in ("eva", "clip")})
    assert reader(tmp_path).text(np.array([0])) is None


def test_limits(folder: Path) -> None:
    assert reader(folder, max_shards=2).shard_sizes.tolist() == [5, 5]
    limited = reader(folder, limit=12)
    assert limited.shard_sizes.tolist() == [5, 5, 2]
    assert reader(folder, limit=10).shard_sizes.tolist() == [5, 5]
    assert len(reader(folder, limit=1000)) == 22
    with pytest.raises(IndexError):
        limited.read(np.array([12]))
    hashes = {r.content_hash for r in (limited, reader(folder), reader(folder, "validation"))}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split=test"),
        ({"split": "train", "condition": "eve"}, "did you mean data.condition=eva"),
        ({"split": "train", "target": "text"}, "holds text, no tokens"),
    ],
)
def test_unknown_split_and_arrays(folder: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokenReader(TokenStore.open(folder), **options)


def test_lost_or_damaged_offsets_are_rebuilt(tmp_path: Path) -> None:
    write_store(tmp_path)
    files = [tmp_path / f"train-00000{i}.idx" for i in range(3)]
    before = [file.read_bytes() for file in files]
    files[0].unlink()
    files[1].write_bytes(before[1][:-30] + bytes(30))
    files[2].write_bytes(before[0])
    batch = reader(tmp_path).read(np.arange(15))
    expected = np.stack([sample(i)["eva"] for i in range(15)])
    np.testing.assert_array_equal(batch["condition"].numpy(), expected)
    assert [file.read_bytes() for file in files] == before


def test_more_shards_than_stay_open(tmp_path: Path) -> None:
    write_store(tmp_path, OPEN_SHARDS + 2, 0, shard_samples=1)
    store = reader(tmp_path)
    every = np.arange(OPEN_SHARDS + 2)
    for ids in (every, every[::-1].copy()):
        batch = store.read(ids)
        expected = np.stack([sample(i)["clip"] for i in ids.tolist()])
        np.testing.assert_array_equal(batch["target"].numpy(), expected)
    assert len(store.store._shards) == OPEN_SHARDS


def test_truncated_shard_names_shard_and_samples(tmp_path: Path) -> None:
    write_store(tmp_path)
    path = tmp_path / "train-000001.tar"
    os.truncate(path, path.stat().st_size // 2)
    train = reader(tmp_path)
    train.read(np.arange(5))
    with pytest.raises(UserError, match=r"train-000001.tar has .* samples 2 to 4 .*doctor.*repair"):
        train.read(np.array([5]))


def test_missing_and_empty_shards(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(UserError, match=r"train-000001.tar is missing"):
        reader(tmp_path).read(np.array([5]))
    (tmp_path / "train-000001.tar").touch()
    with pytest.raises(UserError, match=r"train-000001.tar is empty"):
        reader(tmp_path).read(np.array([5]))


def test_full_verification_sees_one_changed_bit(tmp_path: Path) -> None:
    write_store(tmp_path)
    path = tmp_path / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    reader(tmp_path).read(np.array([5]))
    with pytest.raises(UserError, match=r"train-000001.tar has another sha256"):
        reader(tmp_path, verify="full").read(np.array([5]))


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E01, 0xFE01])
def test_not_finite_tokens_name_sample_and_shard(tmp_path: Path, bits: int) -> None:
    write_store(tmp_path)
    path = tmp_path / "train-000001.tar"
    content = bytearray(path.read_bytes())
    start = TokenStore.open(tmp_path).shard(1).offsets[2, 1]
    content[int(start) + 20 : int(start) + 22] = bits.to_bytes(2, "little")
    path.write_bytes(content)
    train = reader(tmp_path)
    train.read(np.array([5, 6, 8, 9]))
    for _ in range(2):
        with pytest.raises(UserError, match=r"sample 000007 in .*train-000001.tar: clip holds NaN"):
            train.read(np.array([6, 7]))


def test_finite_agrees_with_numpy_on_every_bit_pattern() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    halves = patterns.view(np.float16)
    brains = (patterns.astype(np.uint32) << 16).view(np.float32)
    for i in range(0, 2**16, 64):
        block = slice(i, i + 64)
        assert finite(halves[block], "float16") == np.isfinite(halves[block]).all()
        stored = patterns[block].view(np.int16)
        assert finite(stored, "bfloat16") == np.isfinite(brains[block]).all()


def test_bfloat16_store(tmp_path: Path) -> None:
    arrays = {k: ArraySpec("tokens", "bfloat16", (17, 6), True, (4, 4)) for k in ("eva", "clip")}
    values = {k: torch.randn(17, 6) * 1000 for k in arrays}
    with TokenWriter(tmp_path, arrays) as writer:
        writer.add("train", "a", {k: v.numpy() for k, v in values.items()})
    batch = reader(tmp_path).read(np.array([0]))
    assert torch.equal(batch["target"][0], values["clip"].bfloat16())


def _hostile(kind: str) -> bytes:
    """Return a tar that no reader of ours may accept for one eva+clip sample."""
    spec = ARRAYS["eva"]
    start = tar.npy_header("<f2", spec.shape)
    body = start + bytes(spec.nbytes)
    good = tar.header("a.eva.npy", len(body)) + body + tar.padding(len(body))
    text = tar.header("a.json", 2) + b"{}" + tar.padding(2)

    def odd(name: str, content: bytes, kind: bytes = b"0") -> bytes:
        block = bytearray(tar.header(name, len(content)))
        block[156:157] = kind
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block) + content + tar.padding(len(content))

    header = repr({"descr": "|O", "fortran_order": False, "shape": spec.shape}).encode()
    objects = np.lib.format.magic(1, 0) + len(header).to_bytes(2, "little") + header
    wide = tar.npy_header("<f2", (10**9, 10**9))
    return {
        "pickle": good + odd("a.pkl", b"x" * 10),
        "pyd": odd("a.pyd", b"x") + good,
        "pth": good + odd("a.clip.pth", b"x"),
        "traversal": odd("../../a.eva.npy", body) + text,
        "absolute": odd("/a.eva.npy", body) + text,
        "symlink": odd("a.eva.npy", b"", b"2") + text,
        "hard link": odd("a.eva.npy", b"", b"1") + text,
        "device": odd("a.eva.npy", b"", b"3") + text,
        "folder": odd("a", b"", b"5") + good,
        "pax": odd("a.eva.npy", b"20 path=../../x.npy\n", b"x") + good,
        "absurd size": tar.header("a.eva.npy", 8 * 10**9) + body,
        "objects": odd("a.eva.npy", objects + body) + text,
        "absurd shape": odd("a.eva.npy", wide) + text,
        "wrong shape": odd("a.eva.npy", tar.npy_header("<f2", (6, 17)) + bytes(204)) + text,
        "wrong type": odd("a.eva.npy", tar.npy_header("<f4", (17, 6)) + bytes(408)) + text,
        "no npy": odd("a.eva.npy", b"\x80\x04cos\nsystem\n") + text,
        "missing array": good + text,
        "repeated array": good + good + text,
        "foreign array": good + odd("a.other.npy", body) + text,
        "broken header": good[:100] + b"\xff" + good[101:],
    }[kind]


REFUSALS = {
    "only npy, json and jpg": ("pickle", "pyd", "pth"),
    "no plain sample name": ("traversal", "absolute"),
    "is a link, folder, device": ("symlink", "hard link", "device", "folder", "pax"),
    "cut off or claims an absurd size": ("absurd size",),
    "no plain npy file": ("no npy",),
    "index.json promises <f2": ("objects", "absurd shape", "wrong shape", "wrong type"),
    "is incomplete before member": ("repeated array", "foreign array"),
    "is incomplete at the end": ("missing array",),
    "broken tar header": ("broken header",),
}
HOSTILE = [(kind, message) for message, kinds in REFUSALS.items() for kind in kinds]


@pytest.mark.parametrize(("kind", "message"), HOSTILE)
def test_hostile_tars_are_refused_when_offsets_are_rebuilt(
    tmp_path: Path, kind: str, message: str
) -> None:
    arrays = {"eva": ARRAYS["eva"], "clip": ARRAYS["clip"]}
    index = write_store(tmp_path, 1, 0, arrays=arrays)
    content = _hostile(kind) + tar.END
    (tmp_path / "train-000000.tar").write_bytes(content)
    (tmp_path / "train-000000.idx").unlink()
    replace(index, shards=[replace(index.shards[0], bytes=len(content))]).write(tmp_path)
    with pytest.raises(UserError, match=rf"train-000000.tar.*{message}"):
        reader(tmp_path).read(np.array([0]))
