"""The extraction engine and the demo store: same bytes whatever happens on the way."""

import io
import json
import multiprocessing
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import EngineConfig, ExtractConfig, SplitConfig
from blip3o_lit.drawing.thumbnail import opened
from blip3o_lit.extraction.classes import read_classes
from blip3o_lit.extraction.demo import demo_source, demo_store
from blip3o_lit.extraction.engine import device_of, extract, worker_of
from blip3o_lit.images.item import Item, slices
from blip3o_lit.images.item import Source as Images
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.classes import Classes
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.heads import Head
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import DIGITS, digit_prompts, scene
from blip3o_lit.towers.tower import Tower


@pytest.fixture(scope="module")
def towers():
    return {name: demo.load(name) for name in demo.NAMES}


def config(**changes):
    engine = EngineConfig(batch_size=4, shard_samples=8, threads=2, device="cpu")
    return ExtractConfig(images="demo", extract=engine, **changes)


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def jpeg(index):
    buffer = io.BytesIO()
    scene("train", index).image.save(buffer, "JPEG")
    return buffer.getvalue()


def picture_source(count=12, bad=(), captions=True):
    def read(index):
        return lambda: b"broken" if index in bad else jpeg(index)

    items = [Item(f"{n}.jpg", read(n), "a red seven") for n in range(count)]
    return Images("pictures", slices(items, 8), captions=captions)


def test_stored_tokens_are_the_towers_tokens(tmp_path, towers):
    outcome = extract(demo_source(10, 4, 8), towers, tmp_path, config())
    assert outcome.index.splits == {"train": 10, "validation": 4}
    assert outcome.images == 14
    store = TokenStore.open(tmp_path)
    index = TokenIndex.load(tmp_path)
    assert {spec.kind for spec in index.arrays.values()} == {"tokens", "text"}
    for number, split in ((0, "train"), (2, "validation")):
        shard = store.shard(number)
        drawn = scene(split, 1)
        facts = shard.metadata(1)
        assert (facts["caption"], facts["label"]) == (drawn.caption, drawn.label)
        for name, tower in towers.items():
            with torch.inference_mode():
                expected = tower.tokens(tower.preprocess(drawn.image)[None])[0]
            found = store.read([_place(store, number, 1)], name)[0].float()
            assert (found - expected).abs().max() <= 2e-3 * expected.abs().max()
    head = Head.load(tmp_path, "clip")
    assert head.width == demo.PROJECTION


@pytest.mark.parametrize("masked", [False, True])
def test_thumbnails_show_what_the_target_tower_sees(tmp_path, towers, masked):
    if masked:
        towers = {"eva": demo.LeftHalf(towers["eva"]), "clip": towers["clip"]}
    index = extract(demo_source(6, 2, 8), towers, tmp_path, config()).index
    assert index.thumbnails
    shard = TokenStore.open(tmp_path).shard(0)
    for row in range(6):
        drawn = torch.from_numpy(np.array(scene("train", row).image)).permute(2, 0, 1) / 255
        content = shard.thumbnail(row)
        assert len(content) <= 2048
        found = opened([content], ["key"])[0]
        rows, columns = towers["clip"].info.shape.grid
        assert found.shape[1] <= 4 * rows
        assert found.shape[2] <= 4 * columns
        assert (found - drawn).square().mean().sqrt() < 0.05


def test_stores_that_are_passed_on_can_do_without_thumbnails(tmp_path, towers):
    index = extract(demo_source(6, 2, 8), towers, tmp_path, config(thumbnails=False)).index
    assert not index.thumbnails
    assert b".jpg" not in (tmp_path / index.shards[0].file).read_bytes()
    assert extract(demo_source(6, 2, 8), towers, tmp_path, config(thumbnails=False)).already
    with pytest.raises(UserError, match="another thumbnails"):
        extract(demo_source(6, 2, 8), towers, tmp_path, config())


def _place(store, number, row):
    from blip3o_lit.tokens.reading.token_store import Place

    return Place(number, row)


def test_rebuilding_workers_and_interruptions_give_the_same_bytes(tmp_path, towers):
    source = demo_source(20, 12, 8)
    extract(source, towers, tmp_path / "plain", config())
    for worker in (1, 0):
        settings = config()
        settings.extract.shard = f"{worker}/2"
        outcome = extract(source, towers, tmp_path / "workers", settings)
        assert (outcome.index is None) == (worker == 1)

    def stop():
        if any((tmp_path / "broken").glob("train-000001.tar")):
            raise KeyboardInterrupt

    stopped = {**towers, "eva": Wrapped(towers["eva"], before_tokens=stop)}
    with pytest.raises(KeyboardInterrupt):
        extract(source, stopped, tmp_path / "broken", config())
    assert not (tmp_path / "broken" / "index.json").exists()
    outcome = extract(source, towers, tmp_path / "broken", config())
    assert outcome.images < 32  # finished units were not done again
    expected = content(tmp_path / "plain")
    assert content(tmp_path / "workers") == expected
    assert content(tmp_path / "broken") == expected
    assert extract(source, towers, tmp_path / "plain", config()).already


class Wrapped(Tower):
    """A tower that calls a function before it does its work."""

    def __init__(self, tower, before_tokens=lambda: None, before_heads=lambda: None):
        super().__init__()
        self.tower, self.info = tower, tower.info
        self.before_tokens, self.before_heads = before_tokens, before_heads

    def preprocess(self, image):
        return self.tower.preprocess(image)

    def tokens(self, images_B3SS):
        self.before_tokens()
        return self.tower.tokens(images_B3SS)

    def heads(self):
        self.before_heads()
        return self.tower.heads()


def test_two_workers_may_finish_at_the_same_moment(tmp_path, towers):
    source = demo_source(4, 2, 8)
    extract(source, towers, tmp_path / "plain", config())
    outcomes = []

    def overtaken():
        if not outcomes:
            outcomes.append(extract(source, towers, tmp_path / "both", config()))
            raise FileNotFoundError("a file that the other worker cleared away")

    slow = {**towers, "eva": Wrapped(towers["eva"], before_heads=overtaken)}
    index = extract(source, slow, tmp_path / "both", config()).index
    assert index == outcomes[0].index
    assert content(tmp_path / "both") == content(tmp_path / "plain")


def test_another_recipe_may_not_go_on_in_a_folder(tmp_path, towers):
    extract(demo_source(4, 4, 8), towers, tmp_path, config())
    with pytest.raises(UserError, match="finished token store made with another content of images"):
        extract(demo_source(5, 4, 8), towers, tmp_path, config())
    with pytest.raises(UserError, match="another storage, towers|another towers|another captions"):
        extract(demo_source(4, 4, 8), towers, tmp_path, config(storage="float32"))


def test_rejects_are_named_counted_and_limited(tmp_path, towers):
    source = picture_source(20, bad=(3, 9))
    outcome = extract(source, towers, tmp_path / "a", config(max_reject_fraction=0.1))
    assert outcome.index.rejects == 2
    assert outcome.index.samples == 18
    lines = (tmp_path / "a" / "rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["3.jpg", "9.jpg"]
    assert "cannot identify" in json.loads(lines[0])["reason"]
    with pytest.raises(UserError, match="2 of 20 images.*max_reject_fraction=0.05.*3.jpg"):
        extract(source, towers, tmp_path / "b", config(max_reject_fraction=0.05))
    assert not (tmp_path / "b" / "index.json").exists()


def test_hostile_tars_end_as_named_lines_and_never_leave_the_folder(tmp_path, towers):
    def plain(name, body):
        info = tarfile.TarInfo(name)
        info.size = len(body)
        return info, body

    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device = tarfile.TarInfo("device.jpg")
    device.type = tarfile.CHRTYPE
    members = [plain(f"good{n}.jpg", jpeg(n)) for n in range(5)]
    members += [plain(f"evil.{kind}", b"\x80\x04boom") for kind in ("pyd", "pkl", "pth")]
    members += [plain("../../up.jpg", jpeg(0)), plain("/abs.jpg", jpeg(0)), (link, b"")]
    members += [(device, b""), plain("cut.jpg", jpeg(1)[:300]), plain("text.png", b"no picture")]
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for info, body in members:
            archive.addfile(info, io.BytesIO(body))
    before = sorted(path.name for path in tmp_path.iterdir())
    source = open_source(str(tmp_path / "in" / "a.tar"), 8)
    outcome = extract(source, towers, tmp_path / "out", config(max_reject_fraction=0.6))
    assert (outcome.index.samples, outcome.index.rejects) == (5, 6)
    lines = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    reasons = {line["source"].removeprefix("a.tar/"): line["reason"] for line in lines}
    assert set(reasons) == {info.name for info, _ in members[5:]}
    pictures = {name for name in reasons if name.endswith((".jpg", ".png"))}
    assert {name for name, line in zip(reasons, lines) if line["image"]} == pictures
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])


def test_splits_follow_the_rule_and_say_so(tmp_path, towers):
    settings = config(split=SplitConfig(by="content", fraction=0.4, seed=3))
    outcome = extract(picture_source(16), towers, tmp_path, settings)
    assert set(outcome.index.splits) == {"train", "validation"}
    assert "seed 3, 0.4 held out" in outcome.index.split_rule


def test_sources_without_captions_have_no_text(tmp_path, towers):
    outcome = extract(picture_source(4, captions=False), towers, tmp_path, config())
    assert set(outcome.index.arrays) == {"eva", "clip"}


def test_grid_64_averages_projected_tokens(tmp_path, towers):
    source = demo_source(4, 2, 8)
    extract(source, towers, tmp_path / "full", config(storage="float32"))
    outcome = extract(source, towers, tmp_path / "grid", config(store="grid_64"))
    spec = outcome.index.arrays["clip"]
    assert (spec.shape, spec.grid, spec.cls, spec.projected) == ((64, 64), (8, 8), False, True)
    full, grid = TokenStore.open(tmp_path / "full"), TokenStore.open(tmp_path / "grid")
    tokens = full.read([_place(full, 0, 0)], "clip")[:, 1:].float()
    projected = Head.load(tmp_path / "full", "clip")(tokens)[0].numpy()
    blocks = projected.reshape(8, 2, 8, 2, 64).mean((1, 3)).reshape(64, 64)
    found = grid.read([_place(grid, 0, 0)], "clip")[0].float().numpy()
    np.testing.assert_allclose(found, blocks, atol=2e-2, rtol=1e-2)


def test_int8_has_scales_from_a_first_pass(tmp_path, towers):
    outcome = extract(demo_source(24, 8, 8), towers, tmp_path, config(storage="int8"))
    spec = outcome.index.arrays["clip"]
    assert spec.dtype == "int8"
    assert spec.cosine > 0.999
    store = TokenStore.open(tmp_path)
    tower, drawn = towers["clip"], scene("train", 1)
    with torch.inference_mode():
        expected = tower.tokens(tower.preprocess(drawn.image)[None])[0]
    found = store.read([_place(store, 0, 1)], "clip")[0].float()
    assert torch.cosine_similarity(found, expected, -1).mean() > 0.999


def test_class_prompts_are_embedded_by_the_target_tower(tmp_path, towers):
    extract(demo_source(4, 4, 8), towers, tmp_path / "demo", config())
    found = Classes.load(tmp_path / "demo")
    assert (found.names, found.tower) == (list(DIGITS), "demo:clip")
    text_BP = towers["clip"].encode_text(digit_prompts("two"))
    expected = torch.nn.functional.normalize(text_BP.double().mean(0), dim=-1).float()
    assert (found.text_KP[2] - expected).abs().max() < 1e-6
    own = tmp_path / "classes.json"
    own.write_text('{"red": ["a red seven", "a red two"], "blue": "a blue two"}')
    source = picture_source(4, captions=False)
    outcome = extract(source, towers, tmp_path / "own", config(classes=str(own)))
    assert "text" not in outcome.index.arrays
    found = Classes.load(tmp_path / "own")
    assert found.names == ["red", "blue"]
    assert (found.text_KP[1] - towers["clip"].encode_text(["a blue two"])[0]).abs().max() < 1e-6
    own.write_text('["red", "blue"]')
    with pytest.raises(UserError, match="made with another classes"):
        extract(source, towers, tmp_path / "own", config(classes=str(own)))
    with pytest.raises(UserError, match="demo:eva has no text side"):
        extract(source, {"clip": towers["eva"]}, tmp_path / "no", config(classes=str(own)))


def test_files_of_classes(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("tabby cat\n\ntench \n")
    assert read_classes(file) == {
        "tabby cat": ["a photo of a tabby cat."],
        "tench": ["a photo of a tench."],
    }
    for name, content, says in (
        ("a.json", "{", "can't be read"),
        ("b.json", '{"a": "x"}', "two classes"),
        ("c.json", '{"a": "x", "b": [3]}', "the prompts of b"),
        ("d.txt", "one\n", "two classes"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=says):
            read_classes(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        read_classes(tmp_path / "none.txt")


def test_overflow_names_the_sample(tmp_path, towers):
    class Loud(demo.DemoClip):
        def tokens(self, images_B3SS):
            return super().tokens(images_B3SS) * 1e6

    loud = {"eva": towers["eva"], "clip": Loud().eval()}
    with pytest.raises(UserError, match="sample train-000000: clip holds"):
        extract(demo_source(2, 0, 8), loud, tmp_path, config())


def test_memory_and_disk_that_run_out_name_what_to_do(tmp_path, towers, monkeypatch):
    class Full(demo.DemoClip):
        def tokens(self, images_B3SS):
            raise torch.OutOfMemoryError("CUDA out of memory")

    full = {"eva": towers["eva"], "clip": Full().eval()}
    with pytest.raises(UserError, match="try extract.batch_size=2"):
        extract(demo_source(4, 0, 8), full, tmp_path / "a", config())
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="0.00 GB free.*store=grid_64"):
        extract(demo_source(4, 0, 8), towers, tmp_path / "b", config())


def test_workers_come_from_the_option_torchrun_or_slurm(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert worker_of(None) == (0, 1)
    assert worker_of("3/4") == (3, 4)
    for wrong in ("4/4", "1", "a/b", "-1/2"):
        with pytest.raises(UserError, match="from 0 to n - 1"):
            worker_of(wrong)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_STEP", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "5")
    assert worker_of(None) == (3, 5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert worker_of(None) == (1, 2)


def test_a_missing_gpu_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no GPU is visible"):
            device_of("cuda")
    with pytest.raises(UserError, match="is not auto"):
        device_of("gpu")


def test_the_demo_store_is_built_once_and_the_same_everywhere(tmp_path, monkeypatch):
    folders = []
    for name in ("a", "b"):
        monkeypatch.setenv("BLIP3O_HOME", str(tmp_path / name))
        folders.append(demo_store(12, 6))
    assert folders[0].name == folders[1].name
    assert content(folders[0]) == content(folders[1])
    before = (folders[1] / "index.json").stat().st_mtime_ns
    assert demo_store(12, 6) == folders[1]
    assert (folders[1] / "index.json").stat().st_mtime_ns == before
    assert demo_store(13, 6).name != folders[1].name


PRELOADED = ["blip3o_lit.extraction.engine", "blip3o_lit.towers.demo", "sklearn.datasets", "pytest"]


def _work(out, shard, began):
    """One worker process."""
    torch.set_num_threads(1)
    engine = EngineConfig(batch_size=4, shard_samples=8, threads=1, device="cpu", shard=shard)
    towers = {name: demo.load(name) for name in demo.NAMES}
    began.set()
    extract(demo_source(48, 16, 8), towers, Path(out), ExtractConfig(images="demo", extract=engine))


def _kill_until_done(out, kills, seed):
    """Two workers; SIGKILL one at a random time after it began, then start it again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # so that each worker starts in no time

    def start(shard):
        began = context.Event()
        process = context.Process(target=_work, args=(str(out), shard, began))
        process.start()
        return process, began

    rng = random.Random(seed)
    running = {shard: start(shard) for shard in ("0/2", "1/2")}
    for _ in range(kills):
        shard = rng.choice(list(running))
        process, began = running[shard]
        assert began.wait(600)
        time.sleep(rng.uniform(0.0, 0.8))
        process.kill()
        process.join()
        running[shard] = start(shard)
    for process, _ in running.values():
        process.join()
        assert process.exitcode == 0


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_killed_workers_leave_nothing_behind(tmp_path, towers, kills):
    engine = EngineConfig(batch_size=4, shard_samples=8, threads=1, device="cpu")
    plain = ExtractConfig(images="demo", extract=engine)
    extract(demo_source(48, 16, 8), towers, tmp_path / "plain", plain)
    _kill_until_done(tmp_path / "killed", kills, seed=kills)
    assert content(tmp_path / "killed") == content(tmp_path / "plain")
