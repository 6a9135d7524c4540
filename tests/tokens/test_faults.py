"""The bad day: what disks, folders and strangers do to a store ends in one line, or not at all.

Each test looks at stores from outside: real files, real permissions, real limits.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from children import NOBODY, in_child, pickled

from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.inspection.store import inspect
from blip3o_lit.seeds.store import convert
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.index import ArraySpec, ShardEntry, TokenIndex
from blip3o_lit.tokens.store.shards import TokenWriter

SPECS = {name: ArraySpec("tokens", "float16", (4, 3), grid=(2, 2)) for name in ("eva", "clip")}


def store(folder: Path, train: int = 6, validation: int = 2, shard_samples: int = 2) -> Path:
    generator = np.random.default_rng(0)
    with TokenWriter(folder, SPECS, shard_samples) as writer:
        for number in range(train + validation):
            split = "train" if number < train else "validation"
            arrays = {name: generator.standard_normal((4, 3), np.float32) for name in SPECS}
            writer.add(split, f"{number:06d}", arrays, caption=f"caption {number}")
    return folder


def read(folder: Path, split: str = "train", verify: str = "full") -> torch.Tensor:
    reader = TokenReader(TokenStore.open(folder, verify), split, mode=ModeConfig("patch_only"))
    return reader.read(np.arange(len(reader)))["target"]


def test_a_read_only_store_is_read_and_not_written(open_folder: Path) -> None:
    folder = store(open_folder / "s")
    expected = read(folder)
    (folder / "train-000001.idx").unlink()
    folder.chmod(0o555)
    before = sorted(path.name for path in folder.iterdir())

    def work() -> None:
        assert not os.access(folder, os.W_OK)
        assert torch.equal(read(folder), expected)
        assert {f.level for f in inspect(folder).findings} == {"ok", "warn"}

    in_child(work, NOBODY)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_read_only_output_folder_is_named(open_folder: Path) -> None:
    source = pickled(open_folder / "x.pkl")
    source.chmod(0o444)
    out = open_folder / "out"
    out.mkdir()
    out.chmod(0o555)

    def work() -> None:
        for target in (out, out / "deeper"):
            with pytest.raises(UserError, match=f"{out}.*Permission denied"):
                convert(ConvertConfig(str(source), str(target)))

    in_child(work, NOBODY)


def test_an_unreadable_shard_or_pickle_is_named(open_folder: Path) -> None:
    folder = store(open_folder / "s")
    (folder / "train-000001.tar").chmod(0)
    source = pickled(open_folder / "x.pkl")
    source.chmod(0)

    def work() -> None:
        with pytest.raises(UserError, match=r"train-000001\.tar"):
            read(folder)
        with pytest.raises(UserError, match=r"x\.pkl can't be read: Permission denied"):
            convert(ConvertConfig(str(source), "out"))

    in_child(work, NOBODY)


def test_a_shard_that_vanishes_is_named_and_an_open_one_is_kept(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    expected = read(folder)
    reader = TokenReader(TokenStore.open(folder), "train", mode=ModeConfig("patch_only"))
    reader.read(np.array([0]))
    for path in folder.glob("train-*"):
        path.unlink()
    assert torch.equal(reader.read(np.array([0, 1]))["target"], expected[:2])
    with pytest.raises(UserError, match=r"train-000001\.tar is missing"):
        reader.read(np.array([2]))


def test_symbolic_links_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    expected = read(folder)
    (tmp_path / "link").symlink_to(folder, target_is_directory=True)
    moved = tmp_path / "elsewhere.tar"
    shard = folder / "train-000002.tar"
    shutil.move(shard, moved)
    shard.symlink_to(moved)
    assert torch.equal(read(tmp_path / "link"), expected)
    moved.unlink()
    with pytest.raises(UserError, match=r"train-000002\.tar"):
        read(tmp_path / "link")
    shard.unlink()
    shard.symlink_to(shard)
    with pytest.raises(UserError, match=r"train-000002\.tar"):
        read(tmp_path / "link")


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_a_shard_that_is_no_file_is_named_and_nothing_hangs(tmp_path: Path, kind: str) -> None:
    folder = store(tmp_path / "s")
    shard = folder / "train-000001.tar"
    shard.unlink()
    if kind == "folder":
        shard.mkdir()
    elif kind == "fifo":
        os.mkfifo(shard)
    else:
        shard.symlink_to("/dev/zero")

    def work() -> None:
        with pytest.raises(UserError, match=r"train-000001\.tar"):
            read(folder)
        said = [f.says for f in inspect(folder).findings if f.level == "fail"]
        assert any("train-000001.tar is no regular file" in text for text in said)

    in_child(work, seconds=20)


def test_a_pickle_that_is_no_file_is_named_and_nothing_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.pkl")
    (tmp_path / "folder.pkl").mkdir()

    def work() -> None:
        for name in ("x.pkl", "folder.pkl"):
            with pytest.raises(UserError, match=name.replace(".", r"\.")):
                convert(ConvertConfig(str(tmp_path / name), str(tmp_path / "out")))

    in_child(work, seconds=20)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[1]", b'{"schema": 1}', b"\xff\xfe"])
def test_a_damaged_index_is_one_line(tmp_path: Path, content: bytes) -> None:
    folder = store(tmp_path / "s")
    (folder / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index\.json") as error:
        read(folder)
    assert "\n" not in str(error.value)


def test_unicode_and_long_paths_work(tmp_path: Path) -> None:
    deep = tmp_path / "\u00e9\u4e2d\U0001f600 with spaces, 'quotes' = [and] more"
    while len(os.fsencode(deep)) < 3600:
        deep /= "d" * 200
    deep.mkdir(parents=True)
    source = pickled(deep / "\u4e2d\u6587.pkl")
    index = convert(ConvertConfig(str(source), str(deep / "out")))
    assert index.samples == 40
    opened = TokenStore.open(deep / "out", "full")
    reader = TokenReader(opened, "train", mode=ModeConfig("grid_64"))
    assert reader.metadata(np.array([0]))[0]["source"].startswith("\u4e2d\u6587.pkl:")
    with pytest.raises(UserError):
        convert(ConvertConfig(str(source), str(deep / ("x" * 300))))


def linked_copies(folder: Path, shards: int) -> TokenIndex:
    """Make a store of so many shards that share one file's bytes."""
    index = TokenIndex.load(store(folder, 1, 1, 1))
    first = index.shards[0]
    entries = [first, index.shards[1]]
    for number in range(1, shards):
        name = f"train-{number:06d}"
        os.link(folder / first.file, folder / f"{name}.tar")
        os.link(folder / first.offsets, folder / f"{name}.idx")
        entries.append(replace(first, file=f"{name}.tar", offsets=f"{name}.idx"))
    index = replace(index, shards=entries)
    index.write(folder)
    return index


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_thousands_of_tiny_shards_with_few_open_files(tmp_path: Path, count: int) -> None:
    linked_copies(tmp_path / "s", count)
    expected = read(tmp_path / "s", "train", "size")[0]

    def work() -> None:
        limit = len(os.listdir("/proc/self/fd")) + 128  # beside what the tests before have open
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        opened = TokenStore.open(tmp_path / "s")
        reader = TokenReader(opened, "train", mode=ModeConfig("patch_only"))
        assert len(reader) == count
        order = np.random.default_rng(0).permutation(count)
        for part in np.array_split(order, count // 100):
            tokens = reader.read(part)["target"]
            assert torch.equal(tokens, expected.expand_as(tokens))
        found = [f for f in inspect(tmp_path / "s").findings if f.level == "fail"]
        assert found == []

    in_child(work, seconds=120)


def test_a_sparse_50_gb_shard_opens_at_once_in_little_memory(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", 2, 1)
    expected = read(folder)
    size = 50_000_000_000
    shard = folder / "train-000000.tar"
    with open(shard, "r+b") as file:
        file.truncate(size)
    index = TokenIndex.load(folder)
    entries = [replace(e, bytes=size) if e.split == "train" else e for e in index.shards]
    replace(index, shards=entries).write(folder)
    (folder / "train-000000.idx").unlink()

    def work() -> None:
        started = time.monotonic()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert torch.equal(read(folder, verify="size"), expected)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
        assert time.monotonic() - started < 20

    in_child(work)


def test_a_member_that_claims_gigabytes_is_refused(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", 2, 1)
    shard = folder / "train-000000.tar"
    with open(shard, "r+b") as file:
        name = f"{0:06d}.eva.npy"
        file.write(tar.header(name, 8_000_000_000))
        file.truncate(9_000_000_000)
    index = TokenIndex.load(folder)
    changed: list[ShardEntry] = [
        replace(e, bytes=9_000_000_000) if e.split == "train" else e for e in index.shards
    ]
    replace(index, shards=changed).write(folder)
    (folder / "train-000000.idx").unlink()

    def work() -> None:
        with pytest.raises(UserError, match=r"000000\.eva\.npy"):
            read(folder, verify="size")

    in_child(work, seconds=20)


def test_a_full_disk_stops_convert_and_loses_nothing(tmp_path: Path) -> None:
    source = pickled(tmp_path / "x.pkl", 400, 32)
    options = {"shard_samples": 100}
    convert(ConvertConfig(str(source), str(tmp_path / "whole"), **options))

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        with pytest.raises(UserError, match="run the same line again"):
            convert(ConvertConfig(str(source), str(tmp_path / "full"), **options))

    in_child(work)
    assert not (tmp_path / "full" / "index.json").exists()
    convert(ConvertConfig(str(source), str(tmp_path / "full"), **options))
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "full").iterdir()) == names
    for name in names:
        assert (tmp_path / "full" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_clocks_that_jump_change_nothing(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    expected = read(folder)
    for number, path in enumerate(sorted(folder.iterdir())):
        os.utime(path, (number * 10**9, 4 * 10**9 - number * 10**9))
    assert torch.equal(read(folder), expected)
    again = store(tmp_path / "t")
    index = json.loads((again / "index.json").read_text())
    assert [s["sha256"] for s in index["shards"]] == [
        s["sha256"] for s in json.loads((folder / "index.json").read_text())["shards"]
    ]
