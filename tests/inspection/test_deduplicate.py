"""deduplicate: copies leave, everything else stays bit for bit, and a kill leaves a whole store."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from small_store import ARRAYS, jpeg, sample, write_store

from blip3o_lit.config.errors import UserError
from blip3o_lit.inspection.deduplicate import JOURNAL, deduplicate
from blip3o_lit.inspection.store import inspect
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.store.shards import TokenWriter

TRAIN = [0, 1, 2, 1, 3, 4, 4, 4, 4, 5, 6, 7]
VALIDATION = [8, 3, 9, 9]


def write(folder):
    with TokenWriter(folder, ARRAYS, 4, thumbnails=True) as writer:
        for split, numbers in (("train", TRAIN), ("validation", VALIDATION)):
            for place, number in enumerate(numbers):
                facts = {"source": f"{split} {place}", "content": f"{split}{place}"}
                key = f"{split}-{place}"
                writer.add(split, key, sample(number), f"{number}", thumbnail=jpeg(number), **facts)
    return folder


def numbers(folder, split):
    reader = TokenReader(TokenStore.open(folder, "full"), split)
    ids = np.arange(len(reader))
    found = [int(caption) for caption in reader.captions(ids)]
    for place, number in enumerate(found):
        tokens = reader.read(ids[[place]])["target"][0].numpy()
        assert np.array_equal(tokens, sample(number)["clip"][1:])
        assert reader.thumbnails(ids[[place]]) == [jpeg(number)]
    return found


def test_copies_leave_and_the_held_out_one_stays(tmp_path):
    folder = write(tmp_path / "store")
    done = deduplicate(folder)
    assert done.left == {"train": 5, "validation": 1}
    assert numbers(folder, "train") == [0, 1, 2, 4, 5, 6, 7]
    assert numbers(folder, "validation") == [8, 3, 9]
    whats = {finding.what for finding in inspect(folder).findings if finding.level != "ok"}
    assert not whats & {"duplicate content", "split leakage", "shard", "offsets", "samples"}
    lines = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert {line["content"] for line in lines} >= {"train3", "train4", "validation3"}
    assert "5 of train, 1 of validation" in str(done)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not deduplicate(folder).left
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_kill_around_the_new_index_leaves_a_whole_store(tmp_path, killed):
    folder, other = write(tmp_path / "store"), tmp_path / "other"
    shutil.copytree(folder, other)
    deduplicate(other)
    names = {path.name for place in (folder, other) for path in place.glob("train-*")}
    index = (folder if killed == "before" else other) / "index.json"
    # What lies there between the journal and its removal: the files of both, one of the indexes.
    shutil.copyfile(index, tmp_path / "index.json")
    shutil.copytree(other, folder, dirs_exist_ok=True)
    shutil.copyfile(tmp_path / "index.json", folder / "index.json")
    (folder / JOURNAL).write_text(json.dumps(sorted(names)))
    assert len(numbers(folder, "train")) == (12 if killed == "before" else 7)
    deduplicate(folder)
    assert numbers(folder, "train") == [0, 1, 2, 4, 5, 6, 7]
    listed = {shard.file for shard in TokenIndex.load(folder).shards}
    assert {path.name for path in folder.glob("train-*.tar")} == {n for n in listed if "train" in n}
    assert not (folder / JOURNAL).exists()


def test_a_damaged_shard_and_a_split_of_copies_are_refused(tmp_path):
    folder = tmp_path / "store"
    with TokenWriter(folder, ARRAYS) as writer:
        writer.add("train", "a", sample(1))
        writer.add("validation", "b", sample(1))
    with pytest.raises(UserError, match="every sample of train is a copy"):
        deduplicate(folder)
    index = write_store(tmp_path / "other")
    file = tmp_path / "other" / index.shards[0].file
    content = bytearray(file.read_bytes())
    content[700] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="another sha256"):
        deduplicate(tmp_path / "other")
