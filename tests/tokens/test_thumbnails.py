"""Thumbnails in a store: read back by every reader, and no trouble to stores that have none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from small_store import ARRAYS, jpeg, sample, write_store

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.copy_as import copy_as
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.store.shards import TokenWriter


def reader(folder: Path) -> TokenReader:
    return TokenReader(TokenStore.open(folder), "train", mode=ModeConfig("cls_patch"))


@pytest.mark.parametrize("lost", [None, "*.idx"])
def test_thumbnails_come_back_with_or_without_offsets(tmp_path: Path, lost: str | None) -> None:
    index = write_store(tmp_path, thumbnails=True)
    assert index.thumbnails
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")}
    for path in tmp_path.glob(lost or "none"):
        path.unlink()
    train = reader(tmp_path)
    ids = np.array([7, 0, 21])
    assert train.thumbnails(ids) == [jpeg(number) for number in ids]
    assert train.keys(ids) == [f"{number:06d}" for number in ids]
    assert train.captions(ids) == [f"caption {number}" for number in ids]
    expected = np.stack([sample(number)["clip"] for number in ids])
    np.testing.assert_array_equal(train.read(ids)["target"].numpy(), expected)
    assert before | {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")} == before


def test_other_readers_of_tars_see_a_jpeg(tmp_path: Path) -> None:
    write_store(tmp_path, thumbnails=True)
    file = str(tmp_path / "train-000001.tar")
    samples = list(webdataset.WebDataset(file, shardshuffle=False).decode("rgb8"))
    assert [item["__key__"] for item in samples] == [f"{i:06d}" for i in range(5, 10)]
    pixels = np.asarray(Image.open(io.BytesIO(jpeg(7))))
    np.testing.assert_array_equal(samples[2]["jpg"], pixels)
    np.testing.assert_array_equal(samples[2]["eva.npy"], sample(7)["eva"])


def test_older_indexes_say_nothing_and_open(tmp_path: Path) -> None:
    write_store(tmp_path)
    file = tmp_path / "index.json"
    data = json.loads(file.read_text())
    assert data.pop("thumbnails") is False
    file.write_text(json.dumps(data))
    assert not TokenIndex.load(tmp_path).thumbnails
    assert len(reader(tmp_path).read(np.arange(22))["target"]) == 22


def test_recoding_keeps_them(tmp_path: Path) -> None:
    write_store(tmp_path / "old", thumbnails=True)
    (tmp_path / "old" / "heads.safetensors").write_bytes(b"heads")
    index = copy_as(TokenStore.open(tmp_path / "old"), tmp_path / "new", "bfloat16")
    assert index.thumbnails
    ids = np.arange(22)
    assert reader(tmp_path / "new").thumbnails(ids) == reader(tmp_path / "old").thumbnails(ids)


@pytest.mark.parametrize("thumbnails", [True, False])
def test_all_samples_have_one_or_none_has(tmp_path: Path, thumbnails: bool) -> None:
    picture = None if thumbnails else jpeg(0)
    message = "000000: either all samples"
    with (
        pytest.raises(UserError, match=message),
        TokenWriter(tmp_path, ARRAYS, thumbnails=thumbnails) as writer,
    ):
        writer.add("train", "000000", sample(0), thumbnail=picture)


def test_a_tar_that_breaks_the_promise_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path, thumbnails=True)
    for path in tmp_path.glob("*.idx"):
        path.unlink()
    file = tmp_path / "index.json"
    file.write_text(file.read_text().replace('"thumbnails": true', '"thumbnails": false'))
    with pytest.raises(UserError, match="incomplete before member 000000.jpg"):
        reader(tmp_path).read(np.arange(2))


def test_order_of_members_in_a_rebuilt_tar_is_free(tmp_path: Path) -> None:
    index = write_store(tmp_path, 5, 0, thumbnails=True)
    path = tmp_path / index.shards[0].file
    with tarfile.open(path) as archive:
        files = {}
        for name in archive.getnames():
            content = archive.extractfile(name)
            assert content is not None
            files[name] = content.read()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        # One sample's files stay together; within it the JPEG comes last.
        for name in sorted(files, key=lambda name: (name[:6], name.endswith("jpg"))):
            info = tarfile.TarInfo(name)
            info.size = len(files[name])
            archive.addfile(info, io.BytesIO(files[name]))
    entry = json.loads((tmp_path / "index.json").read_text())
    entry["shards"][0]["bytes"] = path.stat().st_size
    (tmp_path / "index.json").write_text(json.dumps(entry))
    (tmp_path / index.shards[0].offsets).unlink()
    train = reader(tmp_path)
    assert train.thumbnails(np.arange(5)) == [jpeg(number) for number in range(5)]
    clip = torch.from_numpy(np.stack([sample(number)["clip"] for number in range(5)]))
    assert torch.equal(train.read(np.arange(5))["target"], clip)
