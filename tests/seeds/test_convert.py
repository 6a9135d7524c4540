"""convert: what the seeds' files hold arrives unchanged, split, named, and whole after any kill."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seed_pickles import embeddings

from blip3o_lit.base.files import claimed
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.seeds import journal
from blip3o_lit.seeds.store import BATCH_BYTES, convert
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import TokenIndex

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage")


def chunks(folder: Path, counts: list[int], tokens: int = 256, **widths: Any) -> list[Any]:
    folder.mkdir(exist_ok=True)
    mode = "cls_patch" if tokens == 257 else "patch_only"
    shards = [embeddings(count, tokens, seed, **widths) for seed, count in enumerate(counts)]
    for number, shard in enumerate(shards):
        name = f"embeddings_shard_{number:05d}_{mode}.pkl"
        (folder / name).write_bytes(pickle.dumps(shard, protocol=5))
    return shards


def by_caption(out: Path, mode: str = "patch_only", projected: bool = False) -> dict[str, Any]:
    """Everything in a store: caption -> (split, key, eva, clip)."""
    store = TokenStore.open(out, verify="full")
    found = {}
    for split in store.index.splits:
        reader = TokenReader(store, split, mode=ModeConfig(mode, projected))
        ids = np.arange(len(reader))
        batch = reader.read(ids)
        pairs = zip(
            reader.captions(ids), reader.keys(ids), batch["condition"], batch["target"], strict=True
        )
        for caption, key, eva, clip in pairs:
            assert caption not in found
            found[caption] = (split, key, eva, clip)
    return found


@pytest.mark.parametrize(
    ("tokens", "mode"), [(64, "grid_64"), (256, "patch_only"), (257, "cls_patch")]
)
def test_every_sample_arrives_unchanged(tmp_path: Path, tokens: int, mode: str) -> None:
    shards = chunks(tmp_path / "in", [7, 5, 9], tokens)
    out = tmp_path / "out"
    index = convert(ConvertConfig(str(tmp_path / "in"), str(out), shard_samples=4))
    found = by_caption(out, mode)
    assert len(found) == index.samples == 21
    assert set(index.splits) == {"train", "validation"}
    for shard in shards:
        for i, caption in enumerate(shard["captions"]):
            _, key, eva, clip = found[caption]
            assert key == shard["keys"][i]
            assert torch.equal(eva, shard["eva_blip3o_embeddings"][i].half())
            assert torch.equal(clip, shard["clip_blip3o_embeddings"][i].half())
    spec = TokenIndex.load(out).arrays["eva"]
    assert (spec.cls, spec.grid) == (tokens == 257, (8, 8) if tokens == 64 else (16, 16))
    assert index.reduced == ("grid_64" if tokens == 64 else None)
    assert spec.tower == "BAAI/EVA-CLIP-8B"
    assert not (out / journal.NAME).exists()


def test_projected_widths_are_recognised_in_reduced_files_alone(tmp_path: Path) -> None:
    for tokens, widths, expected in [
        (64, (1280, 768), True),
        (64, (4096, 1024), False),
        (256, (1280, 768), False),
    ]:
        source = tmp_path / f"{tokens}-{widths[0]}.pkl"
        source.write_bytes(pickle.dumps(embeddings(2, tokens, widths=widths)))
        out = tmp_path / f"out-{source.stem}"
        index = convert(ConvertConfig(str(source), str(out)))
        assert [spec.projected for spec in index.arrays.values()] == [expected] * 2


def test_missing_cls_is_the_mean_only_when_asked(tmp_path: Path) -> None:
    shards = chunks(tmp_path / "in", [3], 256)
    source = str(tmp_path / "in")
    with pytest.raises(UserError, match="missing_cls=mean"):
        convert(ConvertConfig(source, str(tmp_path / "a"), mode="cls_patch"))
    assert not convert(ConvertConfig(source, str(tmp_path / "b"))).arrays["eva"].cls
    convert(ConvertConfig(source, str(tmp_path / "c"), missing_cls="mean"))
    eva = by_caption(tmp_path / "c", "cls_patch")["caption 0.1"][2]
    tokens = shards[0]["eva_blip3o_embeddings"][1]
    assert torch.equal(eva[1:], tokens.half())
    assert torch.allclose(eva[0].float(), tokens.mean(0), atol=1e-3)


def test_patch_only_drops_the_cls_token_and_keeps_the_split(tmp_path: Path) -> None:
    shards = chunks(tmp_path / "in", [40], 257)
    convert(ConvertConfig(str(tmp_path / "in"), str(tmp_path / "a"), mode="patch_only"))
    convert(ConvertConfig(str(tmp_path / "in"), str(tmp_path / "b")))
    without, whole = by_caption(tmp_path / "a"), by_caption(tmp_path / "b", "cls_patch")
    for i, caption in enumerate(shards[0]["captions"]):
        assert torch.equal(without[caption][2], whole[caption][2][1:])
        assert torch.equal(without[caption][3], shards[0]["clip_blip3o_embeddings"][i, 1:].half())
        assert without[caption][0] == whole[caption][0]


def test_equal_images_never_straddle_the_split(tmp_path: Path) -> None:
    shard = embeddings(300, 64)
    for i in range(0, 300, 2):
        shard["eva_blip3o_embeddings"][i + 1] = shard["eva_blip3o_embeddings"][i]
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(shard))
    config = ConvertConfig(str(tmp_path / "x.pkl"), str(tmp_path / "out"), validation_fraction=0.3)
    index = convert(config)
    assert 50 < index.splits["validation"] < 130
    found = by_caption(tmp_path / "out", "grid_64")
    for i in range(0, 300, 2):
        assert found[f"caption 0.{i}"][0] == found[f"caption 0.{i + 1}"][0]


def test_the_seeds_own_splits_can_be_kept(tmp_path: Path) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(embeddings(50, 64)))
    options: Any = {"split_rule": "seed"}
    convert(ConvertConfig(str(tmp_path / "x.pkl"), str(tmp_path / "a"), **options))
    order = torch.randperm(50, generator=torch.Generator().manual_seed(42)).tolist()
    held = {c for c, row in by_caption(tmp_path / "a", "grid_64").items() if row[0] != "train"}
    assert held == {f"caption 0.{i}" for i in order[-5:]}

    chunks(tmp_path / "in", [2] * 7, 64)
    options["validation_fraction"] = 0.3
    convert(ConvertConfig(str(tmp_path / "in"), str(tmp_path / "b"), **options))
    shards = list(range(7))
    random.Random(42).shuffle(shards)
    found = by_caption(tmp_path / "b", "grid_64")
    held = {int(c[8]) for c, row in found.items() if row[0] == "validation"}
    assert held == set(shards[-2:])


def test_keys_stay_unique_and_captions_survive(tmp_path: Path) -> None:
    first, second = embeddings(3, 64, 0), embeddings(3, 64, 1)
    first["keys"] = ["same", "a/../b.c", "\u00fc" * 80]
    second["keys"] = ["same", None, "plain"]
    first["captions"] = ["\ud800 lone", "\u4e2d\u6587 \U0001f600", None]
    second.pop("captions")
    folder = tmp_path / "in"
    folder.mkdir()
    for number, shard in enumerate((first, second)):
        (folder / f"embeddings_shard_{number:05d}.pkl").write_bytes(pickle.dumps(shard))
    convert(ConvertConfig(str(folder), str(tmp_path / "out")))
    store = TokenStore.open(tmp_path / "out")
    rows = {}
    for split in store.index.splits:
        reader = TokenReader(store, split, mode=ModeConfig("grid_64"))
        ids = np.arange(len(reader))
        for key, metadata in zip(reader.keys(ids), reader.metadata(ids)):
            rows[metadata["source"]] = (key, metadata)
    keys = [row[0] for row in rows.values()]
    assert len(set(keys)) == 6
    name = "embeddings_shard_0000{}.pkl:{}"
    assert rows[name.format(0, 0)][0] == "same-00000-00000000"
    assert rows[name.format(1, 0)][0] == "same-00001-00000000"
    assert rows[name.format(0, 1)][0] == "a____b_c"
    assert rows[name.format(0, 1)][1]["original_key"] == "a/../b.c"
    assert rows[name.format(1, 1)][0] == "sample_00000004"
    assert rows[name.format(1, 2)][0] == "plain"
    assert rows[name.format(0, 0)][1]["caption"] == "? lone"
    assert rows[name.format(0, 1)][1]["caption"] == "\u4e2d\u6587 \U0001f600"
    assert rows[name.format(1, 0)][1]["caption"] == ""


def test_int8_and_bf16_are_as_close_as_the_index_says(tmp_path: Path) -> None:
    shards = chunks(tmp_path / "in", [11, 9], 257, widths=(32, 24))
    shards[0]["eva_blip3o_embeddings"][4] = float("nan")
    first = tmp_path / "in" / "embeddings_shard_00000_cls_patch.pkl"
    first.write_bytes(pickle.dumps(shards[0], protocol=5))
    for storage, error in (("int8", 0.03), ("bfloat16", 2**-8)):
        out = tmp_path / storage
        index = convert(
            ConvertConfig(str(tmp_path / "in"), str(out), on_bad="reject", storage=storage)
        )
        assert (index.samples, index.rejects) == (19, 1)
        assert index.arrays["eva"].dtype == storage
        found = by_caption(out, "cls_patch")
        true = shards[1]["eva_blip3o_embeddings"][3]
        stored = found["caption 1.3"][2].float()
        assert (stored - true).abs().max() <= error * true.abs().max()
        if storage == "int8":
            cosine = torch.cosine_similarity(stored.double(), true.double(), -1).mean()
            assert index.arrays["eva"].cosine == pytest.approx(float(cosine), abs=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_bad_samples_stop_or_are_counted(tmp_path: Path, value: float) -> None:
    shard = embeddings(6, 64)
    shard["clip_blip3o_embeddings"][3, 5, 1] = value
    source = tmp_path / "x.pkl"
    source.write_bytes(pickle.dumps(shard))
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"x\.pkl, row 3: sample 000003: clip holds") as error:
        convert(ConvertConfig(str(source), out))
    assert "on_bad=reject" in str(error.value)
    index = convert(ConvertConfig(str(source), out, on_bad="reject"))
    assert (index.samples, index.rejects) == (5, 1)
    lines = (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()
    reject = json.loads(lines[0])
    assert len(lines) == 1
    assert (reject["file"], reject["row"], reject["key"]) == ("x.pkl", 3, "000003")
    assert "clip holds" in reject["reason"]


def test_gaps_in_the_manifest_stop_or_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    chunks(folder, [2, 2, 2], 64)
    names = [f"embeddings_shard_{i:05d}_patch_only.pkl" for i in range(3)]
    shards = [{"output_path": f"/x/{name}", "total_samples": 2} for name in names]
    (folder / "embeddings_manifest.json").write_text(json.dumps({"shards": shards}))
    (folder / names[1]).unlink()
    with pytest.raises(UserError, match=names[1]):
        convert(ConvertConfig(str(folder), str(tmp_path / "out")))
    index = convert(ConvertConfig(str(folder), str(tmp_path / "out"), on_bad="reject"))
    assert (index.samples, index.rejects) == (4, 1)


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    chunks(folder, [2, 2], 256)
    odd = embeddings(2, 256, widths=(5, 3))
    (folder / "embeddings_shard_00002_patch_only.pkl").write_bytes(pickle.dumps(odd))
    with pytest.raises(UserError, match=r"00002_patch_only\.pkl holds other token shapes"):
        convert(ConvertConfig(str(folder), str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_at(fsync_number: int, config: ConvertConfig) -> bool:
    """Convert in a process that dies at its n-th fsync, without a word; False when it ended."""
    child = os.fork()
    if child == 0:
        original, left = os.fsync, [fsync_number]

        def fsync(descriptor: int) -> None:
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)
            original(descriptor)

        os.fsync = fsync
        try:
            convert(config)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_samples_on_both_sides_of_a_batch_arrive_unchanged(tmp_path: Path) -> None:
    widths = (2048, 512)
    batch = BATCH_BYTES // (4 * 256 * sum(widths))
    shard = embeddings(batch + 2, 256, widths=widths)
    source = tmp_path / "x.pkl"
    source.write_bytes(pickle.dumps(shard, protocol=5))
    convert(ConvertConfig(str(source), str(tmp_path / "out")))
    found = by_caption(tmp_path / "out")
    assert len(found) == batch + 2
    for row in (0, batch - 1, batch, batch + 1):
        assert torch.equal(found[f"caption 0.{row}"][2], shard["eva_blip3o_embeddings"][row].half())


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(tmp_path: Path, storage: str) -> None:
    folder = tmp_path / "in"
    shards = chunks(folder, [40, 27], 64)
    shards[0]["eva_blip3o_embeddings"][9, 0, 0] = float("nan")
    first = folder / "embeddings_shard_00000_patch_only.pkl"
    first.write_bytes(pickle.dumps(shards[0], protocol=5))

    def config(name: str) -> ConvertConfig:
        options: Any = {"on_bad": "reject", "shard_samples": 1, "storage": storage}
        return ConvertConfig(str(folder), str(tmp_path / name), **options)

    convert(config("whole"))
    unfinished = False
    for kills in range(100):
        if not killed_at(random.Random(kills).randint(2, 120), config("killed")):
            break
        left = content(tmp_path / "killed")
        unfinished |= any(name.endswith(".tmp") for name in left)
    assert unfinished
    assert 3 < kills < 99
    assert content(tmp_path / "killed") == content(tmp_path / "whole")


def test_another_conversion_or_foreign_files_are_left_alone(tmp_path: Path) -> None:
    shard = embeddings(40, 64)
    shard["eva_blip3o_embeddings"][30, 0, 0] = float("nan")
    source = tmp_path / "x.pkl"
    source.write_bytes(pickle.dumps(shard))
    out = tmp_path / "out"
    out.mkdir()

    def config(**options: Any) -> ConvertConfig:
        return ConvertConfig(str(source), str(out), shard_samples=1, **options)

    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex, which is not ours"):
        convert(config())
    (out / "thesis.tex").unlink()
    with pytest.raises(UserError, match="row 30"):
        convert(config())
    with pytest.raises(UserError, match="another conversion"):
        convert(config(validation_fraction=0.5))
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex, which is not ours"):
        convert(config())
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    with claimed(out, "out"), pytest.raises(UserError, match="another process"):
        convert(config())
    content = (out / journal.NAME).read_bytes()
    (out / journal.NAME).write_bytes(content[:-9])
    with pytest.raises(UserError, match="damaged"):
        convert(config())
    (out / journal.NAME).write_bytes(content)
    assert convert(config(on_bad="reject")).samples == 39
    with pytest.raises(UserError, match="finished token store"):
        convert(config())


def test_a_disk_too_small_is_refused_before_anything_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(embeddings(4, 64)))
    usage = namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10_000))
    with pytest.raises(UserError, match="0.00 GB free.*choose another disk"):
        convert(ConvertConfig(str(tmp_path / "x.pkl"), str(tmp_path / "out")))


def test_the_command_exits_with_2_and_one_line(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "good.pkl").write_bytes(pickle.dumps(embeddings(8, 257)))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "blip3o_lit.convert", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    refused = run("source=x.pkl", "out=out")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "system" in refused.stderr
    assert not (tmp_path / "marker").exists()
    done = run("source=good.pkl", "out=out")
    assert done.returncode == 0, done.stderr
    assert "data.tokens=out mode=cls_patch" in done.stdout
    assert TokenIndex.load(tmp_path / "out").samples == 8


def test_the_command_says_that_pickles_hold_no_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from blip3o_lit.convert import convert as command

    chunks(tmp_path / "in", [5], 64)
    command(ConvertConfig(str(tmp_path / "in"), str(tmp_path / "out")))
    assert "no pictures: pickles hold none" in capsys.readouterr().out
    assert not TokenIndex.load(tmp_path / "out").thumbnails
