"""What doctor says of stored words, and what repair and deduplication make of them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from small_store import CLIP, EVA, sample
from small_words import CAPTIONS, LONGEST, WIDTH, words_of, write_words

from blip3o_lit.inspection.deduplicate import deduplicate
from blip3o_lit.inspection.repair import repair
from blip3o_lit.inspection.store import inspect
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store.index import TokenIndex
from blip3o_lit.tokens.store.sequences import packed, sequence_specs
from blip3o_lit.tokens.store.shards import TokenWriter


def findings(folder: Path, what: str) -> list[str]:
    return [str(finding) for finding in inspect(folder).findings if finding.what == what]


def test_lengths_and_numbers_of_words_are_counted(tmp_path: Path) -> None:
    write_words(tmp_path)
    captions = [c for number in range(29) for c in words_of(number)]
    inspection = inspect(tmp_path)
    assert not [finding for finding in inspection.findings if finding.level == "fail"]
    tokens = np.concatenate(captions).astype(np.float64)
    mean = len(tokens) / len(captions)
    longest = max(map(len, captions))
    assert findings(tmp_path, "lengths of words") == [
        f"ok    lengths of words: {len(captions)} captions, {mean:.1f} tokens on average, "
        f"{longest} in the longest of {LONGEST} that may come"
    ]
    moments = inspection.numbers["words"].moments
    assert moments is not None
    assert moments.patch.count == len(tokens)
    np.testing.assert_allclose(moments.patch.mean_C.numpy(), tokens.mean(0), rtol=1e-12)


def test_damage_is_found_and_named(tmp_path: Path) -> None:
    write_words(tmp_path)
    with tarfile.open(tmp_path / "train-000001.tar") as archive:
        places = {m.name: m.offset_data + 128 for m in archive.getmembers()}
    with open(tmp_path / "train-000001.tar", "r+b") as file:
        for name, content in (
            ("000006.words_lengths.npy", b"\x4d\0\0\0"),
            ("000008.words.npy", b"\xff\x7f"),
        ):
            file.seek(places[name])
            file.write(content)
    (said,) = findings(tmp_path, "lengths")
    assert said.startswith("fail  lengths: sample 000006 in train-000001.tar: words_lengths [77")
    assert said.endswith("-> extract it again")
    (said,) = findings(tmp_path, "numbers")
    assert "sample 000008 in train-000001.tar: words holds NaN" in said


def test_images_without_captions_are_counted(tmp_path: Path) -> None:
    specs = sequence_specs("words", LONGEST, WIDTH, CAPTIONS)
    with TokenWriter(tmp_path, {"eva": EVA, "clip": CLIP, **specs}) as writer:
        for number in range(5):
            captions = words_of(number) if number % 2 else []
            arrays = {name: sample(number)[name] for name in ("eva", "clip")}
            writer.add("train", f"{number}", arrays | packed("words", captions, specs))
    (said,) = findings(tmp_path, "empty captions")
    assert said.startswith("warn  empty captions: 3 images have no words")


@pytest.mark.parametrize("recipe", [True, False])
def test_a_lost_index_comes_back(tmp_path: Path, recipe: bool) -> None:
    before = write_words(tmp_path)
    (tmp_path / "index.json").unlink()
    (tmp_path / "train-000001.idx").unlink()
    if recipe:
        entries = {name: spec.to_dict() for name, spec in before.arrays.items()}
        captions = entries.pop("text")
        content = {"towers": entries, "captions": captions}
        (tmp_path / "extraction.json").write_text(json.dumps(content))
    after = repair(tmp_path).index
    assert [shard.sha256 for shard in after.shards] == [shard.sha256 for shard in before.shards]
    if recipe:
        assert after.arrays == before.arrays
    found = max(len(c) for number in range(29) for c in words_of(number))
    assert after.arrays["words"].shape == (LONGEST if recipe else found, WIDTH)
    assert after.arrays["words"].kind == "sequence"
    assert after.arrays["words_lengths"] == before.arrays["words_lengths"]
    words = TokenReader(TokenStore.open(tmp_path), "train", "words").read(np.arange(22))
    assert words["condition"].length.tolist() == [len(words_of(n)[0]) for n in range(22)]


def test_deduplication_keeps_the_words_of_what_stays(tmp_path: Path) -> None:
    specs = sequence_specs("words", LONGEST, WIDTH, CAPTIONS)
    with TokenWriter(tmp_path, {"eva": EVA, "clip": CLIP, **specs}, 4) as writer:
        for number in range(8):
            grids = {name: sample(number % 6)[name] for name in ("eva", "clip")}
            words = packed("words", words_of(number), specs)
            writer.add("train", f"{number}", {**grids, **words})
    assert deduplicate(tmp_path).left == {"train": 2}
    assert TokenIndex.load(tmp_path).samples == 6
    reader = TokenReader(TokenStore.open(tmp_path, "full"), "train", "words")
    condition = reader.read(np.arange(6))["condition"]
    for row, length, key in zip(
        condition.words, condition.length.tolist(), reader.keys(np.arange(6))
    ):
        assert torch.equal(row[:length].float(), torch.from_numpy(words_of(int(key))[0]))
