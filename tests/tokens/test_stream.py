"""Remote stores: the same samples over HTTP, shared out over ranks; nothing unsafe is read."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import sample, write_store

from blip3o_lit.base.remote import open_remote, read_whole, resumed
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.batches import batch_plan
from blip3o_lit.tokens.reading.reader import TokenReader, TokenStore
from blip3o_lit.tokens.reading.stream import StreamLoader, StreamReader
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.remote_store import RemoteStore, is_url, open_url

CLS_PATCH = ModeConfig("cls_patch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path)
    return path


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def serving(kind: type[http.server.SimpleHTTPRequestHandler], folder: Path) -> Iterator[str]:
    handler = functools.partial(kind, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with serving(Quiet, folder) as address:
        yield address


def reader(url: str, **options: int) -> StreamReader:
    data = DataConfig(name="tokens", tokens=url, **options)
    return StreamReader(RemoteStore(url), "train", data, CLS_PATCH)


def loader(url: str, steps: int = 5, rank: int = 0, world: int = 1, seed: int = 0) -> StreamLoader:
    return StreamLoader(reader(url), seed, batch_plan(4, None, world), steps, rank)


def test_reads_that_return_less_than_asked_for_are_put_together() -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 3))

    assert read_whole(Slow(b"0123456789"), 8) == b"01234567"
    assert read_whole(Slow(b"01"), 8) == b"01"
    assert read_whole(io.BytesIO(b""), 4) == b""


def test_a_large_shard_of_a_server_without_ranges_is_read(url: str, folder: Path) -> None:
    """fsspec takes a file of up to 5 MiB whole; beyond that it asks for ranges."""
    big = folder / "big.bin"
    big.write_bytes(bytes(range(256)) * 40_000)
    with open_remote(f"{url}/big.bin") as file:
        assert read_whole(file, 12_000_000) == big.read_bytes()
    big.unlink()


def test_streamed_samples_equal_local_ones(folder: Path, url: str) -> None:
    local = TokenReader(TokenStore.open(folder), "train", mode=CLS_PATCH)
    remote = reader(url)
    assert remote.shape == local.shape
    assert len(remote) == len(local)
    for batch in loader(url):
        expected = local.read(batch["sample"].numpy())
        for side in ("condition", "target"):
            np.testing.assert_array_equal(batch[side].numpy(), expected[side].numpy())


def test_an_epoch_reads_each_shard_once_and_epochs_differ(url: str) -> None:
    ids = [i for batch in loader(url, steps=11) for i in batch["sample"].tolist()]
    assert sorted(ids[:22]) != ids[:22]
    assert sorted(ids) == sorted([*range(22), *range(22)])
    assert ids[:22] != ids[22:]
    assert ids == [i for b in loader(url, steps=11) for i in b["sample"].tolist()]


def test_ranks_read_disjoint_shards_and_equal_batches(url: str) -> None:
    parts = [list(loader(url, steps=5, rank=rank, world=2)) for rank in range(2)]
    assert [len(part) for part in parts] == [5, 5]
    first = [
        {i for b in part for i, e in zip(b["sample"].tolist(), b["epoch"].tolist()) if e == 0}
        for part in parts
    ]
    assert not first[0] & first[1]
    with pytest.raises(UserError, match="5 training shards for 8 processes"):
        StreamLoader(reader(url), 0, batch_plan(8, None, 8), 1, 0)


def test_resume_skips_finished_shards(url: str) -> None:
    first = loader(url)
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    state = first.state_dict()
    assert (state["samples"], state["steps"], state["approximate"]) == (12, 3, True)
    second = loader(url)
    second.load_state_dict(state)
    assert len(list(second)) == 2
    shards = first._shards(0)
    ends = np.cumsum(np.array([5, 5, 5, 5, 2])[shards]).tolist()
    assert second._shards(0) == [n for n, end in zip(shards, ends) if end > 12]
    assert len(second._shards(0)) in (2, 3)
    assert second._shards(1) == first._shards(1)


def test_data_module_over_http(url: str) -> None:
    config = DataConfig(name="tokens", tokens=url, validation_subset=6)
    data = TokenDataModule(config, CLS_PATCH, url, seed=0, batch_size=4, steps=3)
    data.open()
    assert data.validation is not None
    got = data.validation.read(np.array([5]))["target"][0].numpy()
    np.testing.assert_array_equal(got, sample(27)["clip"])
    assert isinstance(data.train_dataloader(), StreamLoader)
    assert len(list(data.train_dataloader())) == 3


@pytest.mark.parametrize("address", ["pipe:cat /etc/passwd", "ftp://host/a", "https://a::file://b"])
def test_other_schemes_are_refused(address: str) -> None:
    assert is_url(address)
    with pytest.raises(UserError, match="is not read; use one of http"):
        open_url(address)
    module = TokenDataModule(DataConfig(), CLS_PATCH, address, seed=0, batch_size=4)
    with pytest.raises(UserError, match="is not read"):
        module.open()


class Breaking(Quiet):
    """Breaks the first answer with a shard after some bytes."""

    answers = 0

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if not self.path.endswith(".tar"):
            super().copyfile(source, outputfile)
            return
        Breaking.answers += 1
        outputfile.write(source.read(3000 if Breaking.answers == 1 else -1))
        self.close_connection = True


def test_a_broken_connection_is_resumed(folder: Path, url: str) -> None:
    whole = list(reader(url).samples(1))
    with serving(Breaking, folder) as address:
        samples = list(reader(address).samples(1))
    assert Breaking.answers == 2
    assert [sample["id"] for sample in samples] == [sample["id"] for sample in whole]
    for one, other in zip(samples, whole):
        np.testing.assert_array_equal(one["eva"], other["eva"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=12), st.integers(0, 9))
def test_nothing_is_lost_or_repeated_over_broken_connections(lengths: list[int], n: int) -> None:
    """Each connection gives some items and breaks; three in a row without any end it."""
    connections = iter(lengths)

    def read(start: int) -> Iterator[int]:
        yield from range(start, min(start + next(connections, n), n))
        if start < n:
            raise ConnectionResetError("reset by peer")

    items: list[int] = []
    end = ""
    try:
        items.extend(resumed(read, "https://host/a.tar", pauses=(0, 0)))
    except UserError as error:
        end = str(error)
    assert end in ("", "https://host/a.tar can't be read (reset by peer): check the network")
    assert items == list(range(len(items)))
    assert end or len(items) == n


def test_a_missing_file_is_not_asked_for_again(url: str) -> None:
    with pytest.raises(UserError, match=r"none.tar can't be read \(it is not there\)"):
        list(resumed(lambda _: iter([open_remote(f"{url}/none.tar")]), f"{url}/none.tar"))


def test_missing_files_and_foreign_subsets(url: str) -> None:
    with pytest.raises(UserError, match="nowhere/index.json can't be opened"):
        RemoteStore(f"{url}/nowhere")
    with pytest.raises(UserError, match="data.max_shards"):
        reader(url, subset=4)


def _damaged(kind: str, content: bytes) -> bytes:
    if kind == "cut":
        return content[: len(content) // 2]
    if kind == "short":
        return tar.END
    if kind == "absurd size":
        return tar.header("a.eva.npy", 8 * 10**9) + content[512:]
    if kind == "pickle":
        return tar.header("a.pkl", 4) + b"abcd" + bytes(508) + content
    if kind == "traversal":
        block = bytearray(content[:512])
        block[:9] = b"../../evi"
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block) + content[512:]
    if kind == "nan":
        place = content.index(b"\x93NUMPY") + 128
        return content[:place] + b"\x00\x7e" + content[place + 2 :]
    return content.replace(b"'<f2'", b"'<i2'", 1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "cut off"),
        ("short", "holds 0 samples, index.json promises 5"),
        ("absurd size", "claims 8000000000 bytes"),
        ("pickle", "only npy, json and jpg"),
        ("traversal", "no plain sample name"),
        ("nan", "holds NaN"),
        ("wrong type", "holds <i2"),
    ],
)
def test_damaged_and_hostile_streams_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    index = write_store(tmp_path, 5, 0)
    path = tmp_path / "train-000000.tar"
    path.write_bytes(_damaged(kind, path.read_bytes()))
    replace(index, shards=[replace(index.shards[0], bytes=path.stat().st_size)]).write(tmp_path)
    with pytest.raises(UserError, match=rf"train-000000.tar.*{message}"):
        list(loader(f"file://{tmp_path}", steps=2))
