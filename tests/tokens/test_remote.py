"""Remote stores: what comes through the cache is what lies in the bucket, once, in a limit."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bucket as server
import numpy as np
import pytest
import torch
from bucket import Bucket
from conftest import ROOT
from disturbed import Disturbance, assert_same_end, run
from hub_server import TOKEN
from hub_server import serving as hub
from quick_run import config
from small_disk import fill, small_disk
from small_store import int8_tokens, write_int8, write_store
from small_words import write_words

from blip3o_lit import api
from blip3o_lit.base import objects
from blip3o_lit.base.objects import Objects, is_url
from blip3o_lit.config.data import DataConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.config.trainer import TrainerConfig
from blip3o_lit.tokens.datamodule import TokenDataModule
from blip3o_lit.tokens.reading.open import open_store
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.training.run import run_training

CLS_PATCH = ModeConfig("cls_patch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    write_store(path)
    return path


@pytest.fixture
def url(bucket: Bucket, folder: Path, request: pytest.FixtureRequest) -> str:
    """The store in the bucket, under a name of this test's own."""
    return bucket.upload(folder, request.node.name)


def module(tokens: Path | str, cache: Path, steps: int = 11, **options: Any) -> TokenDataModule:
    settings = {"shuffle_window": 2, "cache": str(cache)} | options
    data = DataConfig(name="tokens", tokens=str(tokens), **settings)
    opened = TokenDataModule(data, CLS_PATCH, str(tokens), seed=0, batch_size=4, steps=steps)
    opened.open()
    return opened


def seen(data: TokenDataModule) -> list[torch.Tensor]:
    """Return all that training, validation and the scales give, in order."""
    parts = [data.condition_standardizer.mean_NC, data.target_standardizer.std_NC]
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        parts += [batch["sample"], batch["condition"], batch["target"]]
    return parts


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def shards(cache: Path) -> list[Path]:
    return sorted((cache / "shards").glob("*.tar"))


def test_cold_warm_and_local_are_the_same(
    bucket: Bucket, folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = seen(module(folder, tmp_path))
    name = url.rpartition("/")[2]
    monkeypatch.setattr(objects, "PART", 1500)  # each shard in parts
    for _ in ("cold", "warm"):
        monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / os.urandom(4).hex()))
        assert same(seen(module(url, tmp_path / "cache")), expected)
    index = TokenIndex.load(folder)
    fetched = [file for file in bucket.asked(name) if file.endswith(".tar")]
    parts = [-(-shard.bytes // 1500) for shard in index.shards]
    assert len(fetched) == sum(parts) + 1  # and one question whether there are parts
    for path in shards(tmp_path / "cache"):
        assert path.stem[:64] in {shard.sha256 for shard in index.shards}


def test_threads_look_ahead_only_for_what_is_missing(url: str, tmp_path: Path) -> None:
    data = module(url, tmp_path / "cache")

    def names() -> set[str]:
        found: set[str] = set()
        for _ in data.train_dataloader():
            found |= {thread.name for thread in threading.enumerate()}
        return found

    names()
    assert not {name for name in names() if name.startswith("ahead")}


def test_words_in_a_bucket_are_those_of_the_folder(
    bucket: Bucket, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    index = write_words(tmp_path / "words")
    url = bucket.upload(tmp_path / "words", request.node.name)
    room = 7 * max(shard.bytes for shard in index.shards) / 1e9  # and no more
    found = []
    for tokens in (str(tmp_path / "words"), url):
        own = module(tokens, tmp_path / "cache", condition=["eva", "words"], cache_gb=room)
        assert own.words_standardizer is not None
        parts = [own.words_standardizer.mean_NC, own.words_standardizer.std_NC]
        for batch in (*own.train_dataloader(), *own.val_dataloader()):
            parts += [batch[key] for key in ("sample", "condition", "words", "length")]
        found.append(parts)
    assert same(*found)


def test_baselines_and_scores_through_a_bucket_are_those_of_the_folder(
    folder: Path, url: str, tmp_path: Path
) -> None:
    small = ["model.width=16", "model.depth=1", "model.heads=2", "model.kv_heads=1"]
    small += ["model.mlp_width=16", "trainer.max_steps=3", "batch_size=4", "trainer.log_every=1"]
    asked = ["solvers=[heun-2]", "curve=[]", "samples=0", "drawn_images=0", "baselines=cheap"]
    found = []
    for name, tokens in (("local", str(folder)), ("bucket", url)):
        words = ["data=tokens", f"data.tokens={tokens}", f"data.cache={tmp_path / 'cache'}"]
        run = api.train(api.compose("train", *words, *small, "logger=csv"), tmp_path / name)
        scores = api.evaluate(api.compose("evaluate", f"ckpt={run}", *asked, "device=cpu"))
        blocks = {**scores["estimators"], **scores["baselines"]}
        assert set(blocks) == {"mean", "heun-2", "mean_token", "ridge"}
        found.append({n: b | {"seconds_per_image": 0} for n, b in blocks.items()})
    assert found[0] == found[1]
    assert shards(tmp_path / "cache")


def test_stores_in_buckets_and_folders_mix_as_folders_do(
    bucket: Bucket, folder: Path, url: str, tmp_path: Path
) -> None:
    write_store(tmp_path / "other", 9, 3, 4)
    other = str(tmp_path / "other")

    def mixture(first: str) -> list[torch.Tensor]:
        stores = {first: 0.3, other: 0.7}
        data = DataConfig("tokens", stores, cache=str(tmp_path / "cache"), shuffle_window=2)
        opened = TokenDataModule(data, CLS_PATCH, stores, seed=0, batch_size=4, steps=11)
        opened.open()
        return seen(opened)

    assert same(mixture(url), mixture(str(folder)))
    assert shards(tmp_path / "cache")


@pytest.mark.parametrize("kind", ["channel", "token"])
def test_int8_comes_with_its_scales(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    write_int8(tmp_path / "store", int8_tokens(kind))
    url = bucket.upload(tmp_path / "store", f"int8-{kind}")
    data = DataConfig(name="tokens", tokens=url, cache=str(tmp_path / "cache"))
    ids = np.array([39, 3, 3, 17])
    remote = TokenReader(open_store(url, data), "train").read(ids)
    local = TokenReader(TokenStore.open(tmp_path / "store"), "train").read(ids)
    assert torch.equal(remote["condition"], local["condition"])


FETCH_ALL = """
import os, signal, sys
from pathlib import Path
from blip3o_lit.base.objects import Objects
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.store.shard_cache import ShardCache

url, cache, after = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
count, write = 0, os.pwrite

def pwrite(descriptor, content, place):
    global count
    count += 1
    if count == after:
        write(descriptor, bytes(content)[:100], place)
        os.kill(os.getpid(), signal.SIGKILL)
    return write(descriptor, content, place)

os.pwrite = pwrite
objects = Objects(url)
shards = TokenIndex.parse(objects.whole("index.json"), url).shards
held = ShardCache(cache, objects, limit=10**9)
for entry in shards:
    held.hold(entry).close()
"""
"""A process that fetches all shards of a store, killed in the middle of its Nth write."""


def fetch_all(url: str, cache: Path, after: int = 0) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", FETCH_ALL, url, str(cache), str(after)]
    return subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_processes_share_a_cache_and_each_shard_comes_once(
    bucket: Bucket, folder: Path, url: str, tmp_path: Path
) -> None:
    processes = [fetch_all(url, tmp_path / "cache") for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    name = url.rpartition("/")[2]
    fetched = [file for file in bucket.asked(name) if file.endswith(".tar")]
    assert sorted(fetched) == sorted(shard.file for shard in TokenIndex.load(folder).shards)
    assert same(seen(module(url, tmp_path / "cache")), seen(module(folder, tmp_path)))
    assert len(bucket.asked(name)) == len(fetched) + 3


def test_the_limit_holds_and_what_is_read_stays(
    folder: Path, bucket: Bucket, tmp_path: Path
) -> None:
    write_store(tmp_path / "store", 60, 7)
    url = bucket.upload(tmp_path / "store", "many")
    largest = max(shard.bytes for shard in TokenIndex.load(tmp_path / "store").shards)
    limit = 4.5 * largest
    options = {"shuffle_window": 1, "cache_gb": limit / 1e9}
    expected = seen(module(tmp_path / "store", tmp_path, steps=40, shuffle_window=1))
    cache = tmp_path / "cache"
    cache.mkdir()
    mine = cache / "notes.txt"
    mine.write_text("not ours")
    data = module(url, cache, steps=40, **options)
    most = []

    def watched() -> Iterator[torch.Tensor]:
        for batch in (*data.train_dataloader(), *data.val_dataloader()):
            most.append(sum(path.stat().st_size for path in (cache / "shards").glob("*.[tp]a*")))
            yield from (batch["sample"], batch["condition"], batch["target"])

    assert same(expected[2:], list(watched()))
    assert max(most) <= limit
    assert max(most) > 2 * largest
    assert mine.read_text() == "not ours"
    with pytest.raises(UserError, match=r"data.cache_gb=\S+ or more, or lower data.shuffle_window"):
        module(url, cache, shuffle_window=5, cache_gb=limit / 1e9)


def check_killed(url: str, folder: Path, cache: Path, after: int) -> None:
    process = fetch_all(url, cache, after)
    assert process.wait(60) == -signal.SIGKILL
    known = {shard.sha256: shard for shard in TokenIndex.load(folder).shards}
    for path in shards(cache):
        entry = known[path.stem[:64]]
        assert path.read_bytes() == (folder / entry.file).read_bytes()


def test_a_kill_leaves_no_bad_file(folder: Path, url: str, tmp_path: Path) -> None:
    check_killed(url, folder, tmp_path / "cache", 3)
    assert list((tmp_path / "cache" / "shards").glob("*.part"))
    expected = seen(module(folder, tmp_path))
    assert same(seen(module(url, tmp_path / "cache")), expected)
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.soak)])
def test_a_run_that_is_killed_leaves_no_bad_file_and_ends_as_a_local_one(
    bucket: Bucket, tmp_path: Path, kills: int
) -> None:
    """Each kill at some access to a file of the cache, or some time after it."""
    store, cache, folder = tmp_path / "store", tmp_path / "cache", tmp_path / "killed"
    index = write_store(store, 60, 7)
    url = bucket.upload(store, f"kills-{kills}")
    data = DataConfig("tokens", url, cache=str(cache), shuffle_window=1)
    trainer = TrainerConfig(9 + 4 * kills, log_every=1, accelerator="cpu")
    wanted = config(data=data, resume="auto", trainer=trainer)
    known, draws = {shard.sha256: shard.file for shard in index.shards}, random.Random(kills)
    for number in range(kills):
        if number % 2:  # else whole shards are there, and resumption reads them
            for path in shards(cache)[::2]:
                path.unlink()
        delay = 0.02 * draws.random() if number % 3 else 0.0
        at = Disturbance("/cache/shards/", draws.randint(3, 60), delay=delay)
        codes = run(folder, wanted, planned=at, **bucket.variables)
        assert codes in ([-signal.SIGKILL], [-signal.SIGPROF], [0])
        for path in shards(cache):
            assert path.read_bytes() == (store / known[path.stem[:64]]).read_bytes()
    assert run(folder, wanted, **bucket.variables) == [0]
    assert not list((cache / "shards").glob("*.part"))
    local = replace(wanted, data=replace(data, tokens=str(store), cache=None))
    run_training(local, tmp_path / "local", [])
    assert_same_end(tmp_path / "local", folder)


def test_a_cut_off_file_of_the_cache_is_fetched_again(
    folder: Path, url: str, tmp_path: Path
) -> None:
    expected = seen(module(folder, tmp_path))
    seen(module(url, tmp_path / "cache"))
    for path in shards(tmp_path / "cache")[:2]:
        os.truncate(path, 100)
    assert same(seen(module(url, tmp_path / "cache")), expected)


def test_a_run_goes_on_with_an_emptied_cache_in_another_world(
    folder: Path, url: str, tmp_path: Path
) -> None:
    def batches(data: TokenDataModule, state: dict[str, Any] | None, world: int) -> list[Any]:
        ranks = []
        for rank in range(world):
            loader = data.train_dataloader()
            loader.rank, loader.plan = rank, replace(loader.plan, world_size=world)
            loader.plan = replace(loader.plan, micro_batch_size=4 // world)
            if state:
                loader.load_state_dict(state)
            ranks.append(loader)
        return ranks

    (local,) = batches(module(folder, tmp_path), None, 1)
    whole = [batch["condition"] for batch in local]
    (first,) = batches(module(url, tmp_path / "one"), None, 1)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    ranks = batches(module(url, tmp_path / "two"), first.state_dict(), 2)
    parts = [[batch["condition"] for batch in rank] for rank in ranks]
    assert same([torch.cat(step) for step in zip(*parts)], whole[4:])


class Web(http.server.SimpleHTTPRequestHandler):
    """A web server without ranges that breaks off its first answer with a shard."""

    broken = 0

    def log_message(self, format: str, *args: object) -> None:
        pass

    def copyfile(self, source: Any, outputfile: Any) -> None:
        if self.path.endswith(".tar") and not Web.broken:
            Web.broken += 1
            outputfile.write(source.read(3000))
            self.close_connection = True
        else:
            super().copyfile(source, outputfile)


@contextlib.contextmanager
def web(folder: Path) -> Iterator[str]:
    handler = functools.partial(Web, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def test_a_web_server_and_a_broken_connection(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = seen(module(folder, tmp_path))
    monkeypatch.setattr(objects, "PART", 1500)
    monkeypatch.setattr(Objects.__init__, "__defaults__", ((0.01, 0.01),))
    with web(folder) as address:
        assert same(seen(module(address, tmp_path / "cache")), expected)
    assert Web.broken == 1
    with pytest.raises(
        UserError, match=r"127.0.0.1:\d+/index.json can't be read \(.*\): check the"
    ):
        module(address, tmp_path / "other")  # nobody listens any more


def test_a_data_set_of_the_hub(folder: Path, tmp_path: Path) -> None:
    with hub(tmp_path / "hub") as running:
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        running.repositories["org/tokens"] = files
        address = "hf://datasets/org/tokens/store"
        assert TOKEN
        data = module(address, tmp_path / "cache")
        expected = seen(module(folder, tmp_path))
        assert same(seen(data), expected)


@pytest.mark.parametrize("address", ["pipe:cat /etc/passwd", "ftp://host/a", "https://a::file://b"])
def test_other_schemes_are_refused(address: str, tmp_path: Path) -> None:
    assert is_url(address)
    with pytest.raises(UserError, match="is not read; use one of http"):
        module(address, tmp_path)


def test_faults_are_one_line(
    bucket: Bucket, folder: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, **options: Any) -> None:
        cache = tmp_path / os.urandom(4).hex()
        with pytest.raises(UserError, match=match) as caught:
            seen(module(options.pop("tokens", url), cache, **options))
        assert "\n" not in str(caught.value)
        assert not [path for path in shards(cache) if path.stem[:64] not in known]
        assert not list((cache / "shards").glob(f"{broken.sha256}*.part"))

    (broken,) = [s for s in TokenIndex.load(folder).shards if s.file == "train-000002.tar"]
    known = {shard.sha256 for shard in TokenIndex.load(folder).shards}
    place = bucket.folder / url.rpartition("/")[2]
    refused("NoSuchBucket.*check the address", tokens="s3://none/tokens")
    refused("NoSuchKey.*check the address", tokens="s3://bucket/none")
    shard = place / "train-000002.tar"
    content = shard.read_bytes()
    shard.write_bytes(content[:4000])
    refused(f"train-000002.tar is not the shard.*has 4000 bytes.*promises {len(content)}")
    shard.write_bytes(content[:-1] + b"x")
    refused("train-000002.tar is not the shard of its store .its crc32")
    shard.unlink()
    refused("train-000002.tar can't be read .NoSuchKey")
    shard.write_bytes(content)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    refused("SignatureDoesNotMatch.*check the credentials")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    refused("check the credentials")


def test_a_full_disk_is_one_line_and_what_was_fetched_stays(
    folder: Path, url: str, tmp_path: Path
) -> None:
    expected = seen(module(folder, tmp_path))
    whole = sum(shard.bytes for shard in TokenIndex.load(folder).shards)
    with small_disk(tmp_path / "disk", whole * 2) as disk:
        data = module(url, disk, cache_gb=1)
        fetched = {path: path.read_bytes() for path in shards(disk)}
        filler = fill(disk)
        with pytest.raises(
            UserError, match=r"data\.cache=.*No space left.*lower data\.cache_gb"
        ) as it:
            seen(data)
        assert "\n" not in str(it.value)
        assert all(path.read_bytes() == content for path, content in fetched.items())
        assert not list((disk / "shards").glob("*.part"))
        with pytest.raises(UserError, match=r"data\.cache=.*disk is full"):
            module(url + "/", disk / "other", cache_gb=1)
        filler.unlink()
        assert same(seen(module(url, disk, cache_gb=1)), expected)


def test_keys_of_the_aws_files(
    url: str, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in bucket.variables:
        monkeypatch.delenv(name)
    key, secret = server.KEYS.values()
    (tmp_path / "keys").write_text(
        f"[me]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n"
    )
    (tmp_path / "config").write_text(
        f"[profile me]\nregion = us-east-1\nendpoint_url = {bucket.endpoint}\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "me")
    assert objects.Objects(url).whole("index.json")
