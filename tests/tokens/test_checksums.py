"""Both checksums of a shard: whose they are, who checks which, and indexes that lack one."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bucket import Bucket
from small_store import write_store

from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.repair import repair
from blip3o_lit.inspection.store import inspect
from blip3o_lit.tokens.reading.open import open_store
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.checksums import Checksums, checksums_of
from blip3o_lit.tokens.store.index import TokenIndex


def edited(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change every shard's entry in index.json."""
    data = json.loads((folder / "index.json").read_text())
    for shard in data["shards"]:
        change(shard)
    (folder / "index.json").write_text(json.dumps(data))


def older(folder: Path) -> None:
    """Make an index what versions without crc32 wrote."""
    edited(folder, lambda shard: shard.pop("crc32"))


def tokens(url: str, cache: Path, verify: str = "size") -> torch.Tensor:
    store = open_store(url, DataConfig("tokens", url, cache=str(cache), verify=verify))
    return TokenReader(store, "train").read(np.arange(22))["target"]


def test_a_writer_and_a_file_have_the_same_two(tmp_path: Path) -> None:
    for shard in write_store(tmp_path).shards:
        content = (tmp_path / shard.file).read_bytes()
        assert shard.crc32 == f"{zlib.crc32(content):08x}"
        assert shard.sha256 == hashlib.sha256(content).hexdigest()
    large = tmp_path / "large"
    large.write_bytes(np.random.default_rng(0).bytes(3_000_001))
    parts, whole = Checksums(), checksums_of(large)
    for first in range(0, 3_000_001, 999_983):
        parts.update(large.read_bytes()[first : first + 999_983])
    assert (parts.sha256, parts.crc32) == (whole.sha256, whole.crc32)
    assert whole.crc32 == f"{zlib.crc32(large.read_bytes()):08x}"


def test_an_index_without_crc32_is_the_same_store(tmp_path: Path) -> None:
    index = write_store(tmp_path)
    older(tmp_path)
    before = TokenIndex.load(tmp_path)
    assert not any(shard.crc32 for shard in before.shards)
    assert before.hash == index.hash
    assert not any("crc32" in shard for shard in before.to_dict()["shards"])
    assert [replace(shard, crc32="") for shard in index.shards] == before.shards
    assert len(TokenReader(TokenStore.open(tmp_path, "full"), "train").read(np.arange(22))) > 1
    assert "fail" not in {finding.level for finding in inspect(tmp_path).findings}
    assert repair(tmp_path).index.shards == index.shards


@pytest.mark.parametrize("crc32", ["123", "0123456g", 17, None])
def test_what_is_no_crc32_is_refused(tmp_path: Path, crc32: object) -> None:
    write_store(tmp_path)
    edited(tmp_path, lambda shard: shard.update(crc32=crc32))
    with pytest.raises(UserError, match=r"index\.json.*(leave it out|repair=true)"):
        TokenIndex.load(tmp_path)


def test_doctor_names_a_wrong_crc32_and_repair_mends_it(tmp_path: Path) -> None:
    index = write_store(tmp_path)
    edited(tmp_path, lambda shard: shard.update(crc32="0" * 8))
    found = [finding for finding in inspect(tmp_path).findings if finding.level == "fail"]
    assert "train-000000.tar is sound, its crc32 in index.json is of another file" in found[0].says
    assert "repair=true" in str(found[0])
    repaired = repair(tmp_path)
    assert repaired.index.shards == index.shards
    assert not repaired.lost


def test_an_older_store_in_a_bucket_and_a_changed_byte_in_either(
    bucket: Bucket, tmp_path: Path
) -> None:
    write_store(tmp_path / "store")
    expected = TokenReader(TokenStore.open(tmp_path / "store"), "train").read(np.arange(22))
    for name in ("crc32", "sha256"):
        if name == "sha256":
            older(tmp_path / "store")
        url = bucket.upload(tmp_path / "store", f"changed-{name}")
        assert torch.equal(tokens(url, tmp_path / name), expected["target"])
        shard = bucket.folder / f"changed-{name}" / "train-000001.tar"
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-000001\.tar is not the shard .*its {name}"):
            tokens(url, tmp_path / f"{name}-empty")


def test_a_forged_shard_serves_no_other_store(bucket: Bucket, tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    expected = TokenReader(TokenStore.open(tmp_path / "store"), "train").read(np.arange(22))
    urls = [bucket.upload(tmp_path / "store", f"forged-{number}") for number in range(3)]
    forged = bucket.folder / "forged-0"
    for path in forged.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"caption 7", b"caption X"))

    def fit(shard: dict[str, Any]) -> None:
        shard["crc32"] = checksums_of(forged / shard["file"]).crc32

    edited(forged, fit)
    assert torch.equal(tokens(urls[0], tmp_path / "cache"), expected["target"])  # sized alike
    with pytest.raises(UserError, match="another sha256"):
        tokens(urls[0], tmp_path / "other", "full")
    store = open_store(urls[1], DataConfig("tokens", urls[1], cache=str(tmp_path / "cache")))
    reader = TokenReader(store, "train")
    assert reader.captions(np.arange(22)) == [f"caption {n}" for n in range(22)]
    asked = [file for file in bucket.asked("forged-1") if file.endswith(".tar")]
    assert asked == ["train-000001.tar"]  # the others are what their sha256 says
    del store, reader  # what is being read keeps its name
    assert torch.equal(tokens(urls[2], tmp_path / "cache"), expected["target"])
    assert not [file for file in bucket.asked("forged-2") if file.endswith(".tar")]
