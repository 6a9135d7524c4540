"""Shards: what goes in comes out, twice the same bytes, and nothing unsafe gets through."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import ARRAYS, CLIP, EVA, sample, write_store

from blip3o_lit.config.errors import UserError
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.shards import (
    ArraySpec,
    TokenIndex,
    TokenWriter,
    pack_offsets,
    unpack_offsets,
)


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_store(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert len(files) == 1 + 2 * (5 + 2)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_headers_are_those_of_earlier_versions() -> None:
    """Whatever Python's tarfile does: another header would change every store's checksums."""
    digest = hashlib.sha256(tar.header("000017.eva.npy", 12345)).hexdigest()
    assert digest == "cde5ceb7af709ea9f2a189eefd2b1118d927d04a1a682ac35766c59f574b56e4"
    with pytest.raises(UserError, match="longer than 100 characters"):
        tar.header("a" * 60 + "." + "b" * 40 + ".npy", 1)


def test_standard_tar_and_numpy_read_a_shard(tmp_path: Path) -> None:
    write_store(tmp_path)
    with tarfile.open(tmp_path / "train-000001.tar") as archive:
        names = archive.getnames()
        content = archive.extractfile("000006.clip.npy")
        assert content is not None
        clip = np.load(io.BytesIO(content.read()), allow_pickle=False)
    assert names[:4] == ["000005.eva.npy", "000005.clip.npy", "000005.text.npy", "000005.json"]
    np.testing.assert_array_equal(clip, sample(6)["clip"])


def test_webdataset_iterates_a_shard(tmp_path: Path) -> None:
    write_store(tmp_path)
    data = webdataset.WebDataset(str(tmp_path / "train-000001.tar"), shardshuffle=False).decode()
    samples = list(data)
    assert [item["__key__"] for item in samples] == [f"{i:06d}" for i in range(5, 10)]
    np.testing.assert_array_equal(samples[2]["eva.npy"], sample(7)["eva"])
    assert samples[2]["json"] == {"caption": "caption 7", "source": "image 7"}


def test_index_describes_the_store(tmp_path: Path) -> None:
    index = write_store(tmp_path)
    assert index.splits == {"train": 22, "validation": 7}
    assert index.samples == 29
    assert index.arrays == ARRAYS
    assert [shard.samples for shard in index.shards] == [5, 5, 5, 5, 2, 5, 2]
    for shard in index.shards:
        assert (tmp_path / shard.file).stat().st_size == shard.bytes
    assert TokenIndex.load(tmp_path).hash == index.hash


def test_hash_follows_content(tmp_path: Path) -> None:
    first = write_store(tmp_path / "a")
    other = write_store(tmp_path / "b", train=21, validation=8)
    assert first.hash != other.hash


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 6.1e4, -7e4])
def test_numbers_that_fp16_cannot_keep_are_refused(tmp_path: Path, bad: float) -> None:
    arrays = {name: value.astype(np.float32) for name, value in sample(0).items()}
    arrays["clip"][3, 1] = bad
    with TokenWriter(tmp_path / "out", ARRAYS) as writer:
        writer.add("train", "good", sample(0))
        with pytest.raises(UserError, match=r"sample cat: clip holds"):
            writer.add("train", "cat", arrays)
    assert TokenIndex.load(tmp_path / "out").samples == 1


def test_error_leaves_no_index_and_no_temporary_file(tmp_path: Path) -> None:
    def fail() -> None:
        with TokenWriter(tmp_path, ARRAYS, shard_samples=2) as writer:
            for number in range(3):
                writer.add("train", str(number), sample(number))
            writer.add("train", "3", sample(3) | {"clip": np.zeros((2, 2))})

    with pytest.raises(UserError, match=r"clip has shape \[2, 2\]"):
        fail()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["train-000000.idx", "train-000000.tar"]


@pytest.mark.parametrize("key", ["", "a.b", "../up", "a/b", "ü", "x" * 61])
def test_unsafe_keys_are_refused(tmp_path: Path, key: str) -> None:
    writer = TokenWriter(tmp_path, ARRAYS)
    with pytest.raises(UserError, match="sample key"):
        writer.add("train", key, sample(0))


def test_repeated_key_missing_array_and_finished_store_are_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, ARRAYS) as writer:
        writer.add("train", "a", sample(0))
        with pytest.raises(UserError, match="twice"):
            writer.add("train", "a", sample(0))
        with pytest.raises(UserError, match="the store"):
            writer.add("train", "b", {"eva": sample(0)["eva"]})
    with pytest.raises(UserError, match="finished token store"):
        TokenWriter(tmp_path, ARRAYS)


def _edited(folder: Path, **changes: object) -> Path:
    path = folder / "index.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, "newer schema 2.*update"),
        ({"schema": 0}, "older schema 0.*again"),
        ({"samples": 30}, "disagree"),
        ({"arrays": {}}, "no arrays"),
        ({"arrays": {"eva": EVA.to_dict() | {"grid": [3, 4]}}}, r"does not hold a \[3, 4\] grid"),
        ({"arrays": {"eva": EVA.to_dict() | {"dtype": "object"}}}, "arrays.eva.dtype=object"),
        ({"shards": [{"file": "../train-000000.tar"}]}, "damaged"),
        ({"shards": None}, "damaged"),
        ({"reduced": "grid_9"}, "reduced=grid_9 is not an option"),
    ],
)
def test_wrong_indexes_are_refused_by_name(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    write_store(tmp_path)
    with pytest.raises(UserError, match=message):
        TokenIndex.load(_edited(tmp_path, **changes))


def test_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path)
    shards = json.loads((tmp_path / "index.json").read_text())["shards"]
    shards[0]["file"] = "../secret.tar"
    with pytest.raises(UserError, match="leaves the folder"):
        TokenIndex.load(_edited(tmp_path, shards=shards))


def test_missing_or_broken_index_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="index.json is missing"):
        TokenIndex.load(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="no token index"):
        TokenIndex.load(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
VALID = TokenIndex({"eva": EVA, "clip": CLIP}, []).to_dict() | {
    "samples": 3,
    "splits": {"train": 3},
    "shards": [
        {
            "file": "train-000000.tar",
            "offsets": "train-000000.idx",
            "split": "train",
            "samples": 3,
            "bytes": 4096,
            "sha256": "0" * 64,
            "crc32": "0" * 8,
        }
    ],
}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(VALID)), json_values)
def test_damaged_index_never_raises_anything_but_user_errors(key: str, value: object) -> None:
    content = json.dumps(VALID | {key: value}).encode()
    with contextlib.suppress(UserError):
        assert TokenIndex.parse(content, "here/index.json").samples == 3


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["eva", "shard"]), st.data())
def test_damaged_nested_fields_raise_user_errors(part: str, data: st.DataObject) -> None:
    document = json.loads(json.dumps(VALID))
    entry = document["arrays"]["eva"] if part == "eva" else document["shards"][0]
    entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(json_values)
    with contextlib.suppress(UserError):
        TokenIndex.parse(json.dumps(document).encode(), "here/index.json")


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3000))
def test_random_bytes_are_no_shard(content: bytes) -> None:
    try:
        found = list(tar.members(memoryview(content), "x.tar"))
    except UserError:
        return
    assert found == []


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("abcXYZ019_-", min_size=1, max_size=60),
            st.sampled_from(["json", "eva.npy"]),
            st.binary(max_size=1200),
        ),
        max_size=6,
    )
)
def test_headers_agree_with_the_standard_library(files: list[tuple[str, str, bytes]]) -> None:
    content = b"".join(
        tar.header(f"{key}.{suffix}", len(body)) + body + tar.padding(len(body))
        for key, suffix, body in files
    )
    content += tar.END
    ours = [(m.name, m.offset, m.size) for m in tar.members(memoryview(content), "x.tar")]
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        theirs = [(m.name, m.offset_data, m.size) for m in archive.getmembers()]
    assert ours == theirs


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(2, 5), st.integers(0, 2**40), st.data())
def test_offsets_survive_and_damage_is_seen(
    samples: int, columns: int, seed: int, data: st.DataObject
) -> None:
    sha256, other = f"{seed:064x}"[::-1], "f" * 64
    offsets = np.random.default_rng(seed).integers(0, 2**60, (samples, columns)).astype(np.uint64)
    content = pack_offsets(offsets, sha256)
    back = unpack_offsets(content, samples, columns, sha256)
    assert back is not None
    np.testing.assert_array_equal(back, offsets)
    assert unpack_offsets(content, samples + 1, columns, sha256) is None
    assert unpack_offsets(content, samples, columns, other) is None
    place = data.draw(st.integers(0, len(content) - 1))
    damaged = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    assert unpack_offsets(damaged, samples, columns, sha256) is None


def test_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    import torch

    spec = ArraySpec("tokens", "bfloat16", (17, 6), cls=True, grid=(4, 4))
    value = sample(1)["eva"].astype(np.float32) * np.float32(1.2345678)
    value[0] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, -1 - 3 * 2**-8, 2**-130, 0]  # ties
    with TokenWriter(tmp_path, {"eva": spec}) as writer:
        writer.add("train", "a", {"eva": value})
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        content = archive.extractfile("a.eva.npy")
        assert content is not None
        stored = np.load(io.BytesIO(content.read()))
    expected = torch.from_numpy(value).bfloat16().view(torch.int16).numpy()
    np.testing.assert_array_equal(stored, expected)
