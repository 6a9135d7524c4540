"""Appends: three of them make what one extraction makes, a killed one leaves the old store."""

import json
import os
import random
import signal
import sys

import numpy as np
import pytest
from disturbed import SERVER

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import EngineConfig, ExtractConfig, SplitConfig
from blip3o_lit.config.towers import TextTowerConfig
from blip3o_lit.extraction.demo import demo_source
from blip3o_lit.extraction.engine import Extraction, extract
from blip3o_lit.images.open import open_source
from blip3o_lit.tokens.reading.token_store import Place, TokenStore
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.towers import demo
from blip3o_lit.towers.scenes import scene
from blip3o_lit.towers.text_tower import load_text_tower


@pytest.fixture(scope="module")
def towers():
    return {name: demo.load(name) for name in demo.NAMES}


def config(**changes):
    # One image a batch: the towers' last bits depend on what is encoded together.
    engine = EngineConfig(batch_size=1, shard_samples=4, threads=2, device="cpu")
    split = SplitConfig(by="content", fraction=0.4)
    return ExtractConfig(images="photos", extract=engine, split=split, **changes)


def draw(folder, numbers):
    folder.mkdir(exist_ok=True)
    for number in numbers:
        scene("train", number).image.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}")


def run(photos, out, towers, settings):
    return extract(open_source(str(photos), 4, out=str(out)), towers, out, settings)


def samples(folder):
    """Return every sample by key: its split, its arrays and its KEY.json."""
    store = TokenStore.open(folder, "full")
    found = {}
    for number, entry in enumerate(store.index.shards):
        shard = store.shard(number)
        for row in range(entry.samples):
            arrays = {n: store.read([Place(number, row)], n).numpy() for n in store.index.arrays}
            found[shard.key(row)] = (entry.split, arrays, shard.metadata(row))
    assert len(found) == store.index.samples
    return found


def test_three_appends_are_one_extraction(tmp_path, towers):
    photos, grown, whole = tmp_path / "photos", tmp_path / "grown", tmp_path / "whole"
    earlier = {}
    for numbers in (range(3), range(3, 9), range(9, 11), range(11, 14)):
        draw(photos, numbers)
        outcome = run(photos, grown, towers, config(append=True))
        now = samples(grown)
        assert all(now[key][0] == split for key, split in earlier.items())
        assert len(now) - len(earlier) == len(numbers)
        earlier = {key: split for key, (split, _, _) in now.items()}
    assert outcome.added == 3
    assert run(photos, grown, towers, config(append=True)).already
    run(photos, whole, towers, config())
    one, many = samples(whole), samples(grown)
    assert one.keys() == many.keys()
    for key, (split, arrays, facts) in one.items():
        assert (split, facts) == (many[key][0], many[key][2])
        assert all(np.array_equal(array, many[key][1][name]) for name, array in arrays.items())
    assert not (grown / ".extract").exists()


def test_words_are_appended_as_they_are_extracted(tmp_path, towers):
    text = load_text_tower(TextTowerConfig("demo"))
    photos, grown, whole = tmp_path / "photos", tmp_path / "grown", tmp_path / "whole"

    def words(out, numbers, **changes):
        draw(photos, numbers)
        source = open_source(str(photos), 4, out=str(out))
        extract(source, towers, out, config(captions=2, **changes), text)
        store, found = TokenStore.open(out, "full"), {}
        for number, entry in enumerate(store.index.shards):
            for row in range(entry.samples):
                tokens, lengths = store.read_captions(Place(number, row), "words")
                found[store.shard(number).key(row)] = tokens.tolist(), lengths.tolist()
        return found

    first = words(grown, range(3), append=True)
    both = words(grown, range(3, 8), append=True)
    assert len(both) == 8
    assert first.items() <= both.items()
    assert both == words(whole, range(8))
    with pytest.raises(UserError, match="append=true: words is stored .* and not made here"):
        run(photos, grown, towers, config(append=True))


def test_int8_keeps_the_scales_of_the_store(tmp_path, towers):
    photos, out = tmp_path / "photos", tmp_path / "out"
    draw(photos, range(4))
    before = run(photos, out, towers, config(storage="int8")).index
    draw(photos, range(4, 8))
    after = run(photos, out, towers, config(storage="int8", append=True)).index
    assert (after.arrays, after.samples) == (before.arrays, 8)
    assert len(samples(out)) == 8


def test_a_killed_append_leaves_the_old_store_and_goes_on(tmp_path, towers):
    photos, out = tmp_path / "photos", tmp_path / "out"
    draw(photos, range(4))
    run(photos, out, towers, config())
    old, before = TokenIndex.load(out), samples(out)
    draw(photos, range(4, 12))
    source = open_source(str(photos), 4, out=str(out))
    broken = Extraction(source, towers, out, config(append=True))
    encode, calls = broken.towers.encode, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(*arguments)

    broken.towers.encode = stop
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    assert (out / ".extract").exists()
    assert TokenIndex.load(out) == old
    assert samples(out).keys() == before.keys()
    outcome = run(photos, out, towers, config(append=True))
    assert outcome.added == 8
    # Stopped once more, after the new index: nothing comes twice.
    (out / ".extract").mkdir()
    record = {"seen": 4, "last": True, "shards": [vars(outcome.index.shards[-1])], "lost": []}
    (out / ".extract" / "unit-all-000001.json").write_text(json.dumps(record))
    assert run(photos, out, towers, config(append=True)).already
    assert len(samples(out)) == 12


def append_here(photos, out, count):
    """Append, and die at the `count`th access to a file of the store."""
    seen = 0

    def look(event, arguments):
        nonlocal seen
        if event in ("open", "os.rename", "os.remove") and str(out) in str(arguments[0]):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    run(photos, out, {name: demo.load(name) for name in demo.NAMES}, config(append=True))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_sigkills_in_an_append_leave_the_old_store(tmp_path, towers, kills):
    photos, out, whole = tmp_path / "photos", tmp_path / "out", tmp_path / "whole"
    draw(photos, range(4))
    run(photos, out, towers, config())
    old, before, added, draws = TokenIndex.load(out), samples(out), 4, random.Random(kills)
    for _ in range(kills):
        draw(photos, range(added, added + 3))
        process = SERVER.Process(target=append_here, args=(photos, out, draws.randint(5, 60)))
        process.start()
        process.join(280)
        assert process.exitcode in (0, -signal.SIGKILL)
        now = samples(out)  # opens every shard, checks its sha256 and reads all
        if TokenIndex.load(out) == old:
            assert now.keys() == before.keys()
        else:  # it was killed after its last step, or had ended
            assert len(now) == added + 3
            old, before, added = TokenIndex.load(out), now, added + 3
    run(photos, out, towers, config(append=True))
    run(photos, whole, towers, config())
    one, many = samples(whole), samples(out)
    assert one.keys() == many.keys()
    for key, (split, arrays, _) in one.items():
        assert split == many[key][0]
        assert all(np.array_equal(array, many[key][1][name]) for name, array in arrays.items())


def test_a_changed_picture_comes_under_a_key_of_its_own(tmp_path, towers):
    photos, out = tmp_path / "photos", tmp_path / "out"
    draw(photos, range(3))
    run(photos, out, towers, config())
    scene("train", 9).image.save(photos / "1.png")
    scene("train", 2).image.save(photos / "copy of 2.png")
    assert run(photos, out, towers, config(append=True)).added == 1
    assert sorted(facts["source"] for _, _, facts in samples(out).values()) == [
        *("0.png", "1.png", "1.png", "2.png")
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"storage": "bfloat16"}, "storage is float16 in out=.* and bfloat16 here"),
        ({"store": "grid_64"}, "of eva is .* here"),
        ({"thumbnails": False}, "thumbnails is True"),
    ],
)
def test_other_formats_are_refused(tmp_path, towers, changes, says):
    photos, out = tmp_path / "photos", tmp_path / "out"
    draw(photos, range(3))
    run(photos, out, towers, config())
    draw(photos, range(4))
    with pytest.raises(UserError, match=says):
        run(photos, out, towers, config(append=True, **changes))
    settings = config(append=True)
    settings.split.seed = 5
    with pytest.raises(UserError, match=r"split\.seed is 0"):
        run(photos, out, towers, settings)
    other = {"eva": demo.LeftHalf(towers["eva"]), "clip": towers["clip"]}
    with pytest.raises(UserError, match="tower of eva is demo:eva in"):
        run(photos, out, other, config(append=True))


def test_a_store_without_hashes_is_refused(tmp_path, towers):
    photos, out = tmp_path / "photos", tmp_path / "out"
    extract(demo_source(4, 2, 4), towers, out, config())
    draw(photos, range(4))
    settings = config(append=True)
    with pytest.raises(UserError, match="has no hash of its file"):
        run(photos, out, towers, settings)
