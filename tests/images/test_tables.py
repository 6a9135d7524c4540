"""Tables, captions, split files and classes as strangers write them: read right, or one line."""

import csv
import io
import itertools
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from blip3o_lit.base.shape import PairShape, TokenShape
from blip3o_lit.config.errors import UserError
from blip3o_lit.extraction.classes import read_classes
from blip3o_lit.images.folder import caption_of, read_folder
from blip3o_lit.images.item import Item, Lost
from blip3o_lit.images.open import open_source
from blip3o_lit.images.table import table_items
from blip3o_lit.metrics.cosine import TokenScores
from blip3o_lit.metrics.retrieval import Retrieval, caption_ids
from blip3o_lit.models.baselines import Ridge

HALF = "\ud83d"
"""The first half of an emoji, as a caption cut by length ends."""


def entries(source):
    return [entry for part in source.parts for entry in part.entries()]


def folder(place, *names):
    for name in names:
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    return place


HEADERS = (
    ("path", "caption", "split", "label"),
    ("Image Path", "Caption", "SPLIT", "Label"),
    (" file_name", "TEXT ", "Split", " label "),
    ("FileName", "prompt", " split", "LABEL"),
)
CELLS = (
    ("a.png", "a red, round seven", "val", "3.0", "a red, round seven", "3"),
    ("b.png", 'a "blue" two', "Training", "cat", 'a "blue" two', "cat"),
    ("c.png", "  ", " dev", "", "", ""),
    ("d e.png", "é日\U0001f600", "test", "-1.0", "é日\U0001f600", "-1"),
    ("e.png", "nan", "TRAIN", "1.5", "", "1.5"),
)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", ", "])
def test_a_table_says_the_same_in_every_dress(tmp_path, encoding, delimiter):
    ends = {"val": "validation", "dev": "validation", "test": "test"}
    for number, (header, end) in enumerate(itertools.product(HEADERS, ("\n", "\r\n"))):
        buffer = io.StringIO()
        writer = csv.writer(buffer, delimiter=delimiter[0], lineterminator=end)
        writer.writerow(header)
        writer.writerows(row[:4] for row in CELLS)
        text = buffer.getvalue()
        if len(delimiter) > 1:
            text = text.replace(",", ", ").replace(", round", "round").replace("redr", "red, r")
            text = text.replace("red,  r", "red, r")
        table = tmp_path / f"{number}.csv"
        table.write_bytes(text.encode(encoding))
        found = entries(open_source(str(table), 8))
        items = {entry.source: entry for entry in found if isinstance(entry, Item)}
        assert len(found) == len(items) == len(CELLS)
        for path, _, split, _, caption, label in CELLS:
            assert (items[path].caption, items[path].extra.get("label", "")) == (caption, label)
            assert items[path].split == ends.get(split.strip().lower(), "train")


def test_json_captions_of_any_type_are_text_or_named(tmp_path):
    values = [
        ("a", "a"),
        (["", None, " b ", "c"], "b"),
        ([], ""),
        (None, ""),
        (float("nan"), ""),
        (3, "3"),
        (3.0, "3"),
        (2.5, "2.5"),
        (f"cut {HALF}", "cut \ufffd"),
        ("\ufeff", ""),
        ("\U0001f600", "\U0001f600"),
    ]
    bad = [{"en": "a"}, [["a"]], [{"raw": "a"}]]
    table = tmp_path / "list.jsonl"
    rows = [value for value, _ in values] + bad
    lines = [json.dumps({"Path": f"{n}.png", "Caption": row}) for n, row in enumerate(rows)]
    lines += ['{"path": "x.png", "caption": "a", "Caption": "b"}', '{"path": ["y.png"]}', "", "{}"]
    table.write_text("\n".join(lines))
    found = entries(open_source(str(table), 8))
    assert len(found) == len(lines) - 1
    items = [entry for entry in found if isinstance(entry, Item)]
    assert [item.caption for item in items] == [caption for _, caption in values]
    for item in items:
        json.dumps([item.source, item.caption], ensure_ascii=False).encode()
    reasons = [entry.reason for entry in found if isinstance(entry, Lost)]
    assert len(reasons) == len(bad) + 3
    assert reasons[3:] == ["caption is there twice", "its path is no text", "no path"]
    for value, caption in values:
        assert caption_of(json.dumps({"Caption": value}).encode(), "json") == caption


def test_caption_files_of_every_encoding():
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert caption_of("a blue é\r\n".encode(encoding), "txt") == "a blue é"
        assert caption_of('{"text": ["a blue é"]}'.encode(encoding), "json") == "a blue é"
    assert caption_of("a\U0001f40d".encode()[:-2], "txt") == "a\ufffd"


def test_paths_that_are_none_lose_their_row_alone(tmp_path):
    folder(tmp_path, "a.png", "~nobody-here/b.png")
    paths = ["a.png", "~nobody-here/b.png", "~nobody-here/c.png", "a\0.png", f"{HALF}.png", ""]
    table = tmp_path / "list.jsonl"
    table.write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    found = entries(open_source(str(table), 8))
    assert [isinstance(entry, Item) for entry in found] == [True, True, True, False, True, False]
    first, literal = found[:2]
    assert isinstance(first, Item)
    assert isinstance(literal, Item)
    assert first.read() == literal.read()
    found[4].source.encode()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"path,caption\na.png,x\nb.png,caf\xe9\n", "line 3 is not UTF-8 .byte 0xe9"),
        ("path,caption\na.png,x\n".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        ("path,caption\na.png,x\n".encode("utf-16")[:-1], "damaged UTF-16"),
        (b"path,caption\na.png," + b"x" * 200_000 + b"\n", "line 2: a cell of over 131072"),
        (b'path,caption\na.png,x\nb.png,"x\nc.png,y\n', "line 3: a quote is left open"),
        (b'path,caption\na.png,"x "y" z"\n', "line 2: .*double the quotes"),
        (b"path,caption,Caption \na.png,x,y\n", "two columns named caption"),
        (b"pics/a.png,a red seven\n", "no column of paths"),
        (b"url,caption\nx,a red seven\n", "no column of paths but caption, url"),
        (b"", "no column of paths"),
        (b"path,split\na.png,train\nb.png,eval\n", "list.csv line 3: split 'eval' is none of"),
    ],
)
def test_what_can_not_be_read_names_the_real_cause(tmp_path, content, says):
    (tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=says) as raised:
        open_source(str(tmp_path / "list.csv"), 8)
    assert "\n" not in str(raised.value)


def test_text_with_a_comma_and_no_quotes_is_not_cut(tmp_path):
    (tmp_path / "list.csv").write_text("path,caption\na.png,a red, round seven\nb.png,b,\n")
    lost, item = entries(open_source(str(tmp_path / "list.csv"), 8))
    assert isinstance(lost, Lost)
    assert isinstance(item, Item)
    assert "quote text with commas" in lost.reason
    assert (item.source, item.caption) == ("b.png", "b")


# split files

NAMES = ("0.png", "1.png", "sub/2.png", "sub/é.png")


def splits_of(source):
    return {entry.source: entry.split for entry in entries(source)}


@pytest.mark.parametrize("kind", ["folder", "table", "absolute table", "tar", "two tars"])
def test_a_split_file_is_used_in_every_spelling_or_refused(tmp_path, monkeypatch, kind):
    photos = folder(tmp_path / "data" / "photos", *NAMES)
    monkeypatch.chdir(tmp_path)
    own = {"folder": "{}", "table": "photos/{}", "absolute table": f"{photos}/{{}}"}.get(kind)
    if own is None:
        own, images = "a.tar/{}", "data/a.tar"
        with tarfile.open(tmp_path / images, "w") as archive:
            for name in NAMES:
                archive.add(photos / name, name)
        if kind == "two tars":
            images = "data/{a,b}.tar"
            with tarfile.open(tmp_path / "data" / "b.tar", "w") as archive:
                archive.add(photos / "0.png", "9.png")
    elif kind == "folder":
        images = "data/photos"
    else:
        images = "data/list.csv"
        (tmp_path / images).write_text("path\n" + "".join(f"{own.format(n)}\n" for n in NAMES))
    held = {own.format(name) for name in NAMES[1:]}
    if "tar" in kind:
        spellings = ["a.tar/{}", "./a.tar/{}", "data/a.tar/{}", f"{tmp_path}/data/a.tar/{{}}"]
        spellings += ["{}", "./{}"] if kind == "tar" else []
    else:
        spellings = ["photos/{}", "data/photos/{}", "data\\photos\\{}", "./data/photos/./{}"]
        spellings += [f"{photos}/{{}}", *(["{}", "./{}"] if kind == "folder" else [])]
    file = tmp_path / "splits.csv"
    for spelling, split in itertools.product(spellings, ("val", "test")):
        rows = "".join(f"{spelling.format(name)},{split}\n" for name in NAMES[1:])
        file.write_text("path,split\n" + rows)
        source = open_source(images, 8, str(file))
        name = "validation" if split == "val" else split
        assert {n for n, s in splits_of(source).items() if s == name} == held
        assert source.split_rule == "given by split.file"
    known = spellings[0].format("0.png")
    for wrong in ("0", "/elsewhere/photos/0.png", "other/0.png", known.upper()):
        for also in ("", f"{known},val\n"):
            file.write_text(f"path,split\n{also}{wrong},val\n")
            with pytest.raises(UserError, match="1 of its . rows name no image") as raised:
                open_source(images, 8, str(file))
            assert repr(wrong) in str(raised.value)
            assert ".png'" in str(raised.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("path,split\n", "names no image"),
        ("path,split\n0.png,holdout\n", "line 2: split 'holdout' is none of"),
        ("path,split\n0.png,\n", "line 2 lacks a path or a split"),
        ("path,split\n0.png,val\n0.png,train\n", "line 3: 0.png is in validation too"),
        ("path,split\n0.png,val\n./0.png,train\n", "gives 0.png two splits"),
        ("name;split\n0.png;val\n", "lacks a path"),
    ],
)
def test_split_files_that_say_nothing_or_two_things(tmp_path, content, says):
    photos = folder(tmp_path / "photos", *NAMES)
    (tmp_path / "splits.csv").write_text(content)
    with pytest.raises(UserError, match=says):
        open_source(str(photos), 8, str(tmp_path / "splits.csv"))


def test_a_split_file_beside_a_column_says_both(tmp_path):
    folder(tmp_path, *NAMES)
    (tmp_path / "list.csv").write_text("path,split\n0.png,train\n1.png,train\n")
    (tmp_path / "splits.tsv").write_text("path\tsplit\n0.png\tval\n")
    source = open_source(str(tmp_path / "list.csv"), 8, str(tmp_path / "splits.tsv"))
    assert splits_of(source) == {"0.png": "validation", "1.png": "train"}
    assert source.split_rule == "given by split.file; else given by the table"


# classes


def test_classes_may_come_through_a_pipe():
    reader, writer = os.pipe()
    os.write(writer, b"one\ntwo\n")
    os.close(writer)
    try:
        assert list(read_classes(Path(f"/dev/fd/{reader}"))) == ["one", "two"]
    finally:
        os.close(reader)


def test_class_files_of_every_make(tmp_path):
    names = ["zéro", "one", "two"]
    for number, (encoding, end, gap) in enumerate(
        itertools.product(("utf-8", "utf-8-sig", "utf-16"), ("\n", "\r\n"), ("", " "))
    ):
        file = tmp_path / f"{number}.txt"
        file.write_bytes(end.join(["zéro", gap, "one ", "two", gap, ""]).encode(encoding))
        assert list(read_classes(file)) == names
        file = tmp_path / f"{number}.json"
        file.write_bytes(json.dumps(names, ensure_ascii=False).encode(encoding))
        assert list(read_classes(file)) == names
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"a": f"cut {HALF}", "b": ""}))
    assert read_classes(file) == {"a": ["cut \ufffd"], "b": ["a photo of a b."]}
    for name, content, says in (
        ("a.txt", b"one\ncaf\xe9\n", "line 2 is not UTF-8"),
        ("b.txt", b"one\ntwo\none\n", "names one twice"),
        ("c.json", b'{"a": "x", "b": "y", "a": "z"}', "names a twice"),
        ("d.json", b'["a", null]', "no name of a class"),
        ("e.json", b'["a", ["b"]]', "no name of a class"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=says):
            read_classes(tmp_path / name)


# scoring


def test_images_without_a_caption_take_no_part_in_recall():
    draw = torch.Generator().manual_seed(0)
    text = torch.randn(40, 8, generator=draw)
    image = text + torch.randn(40, 8, generator=draw)
    captions = [f"caption {n}" if n % 3 else ("", "  \n")[n % 2] for n in range(40)]
    all_of_them, captioned = Retrieval(), Retrieval()
    all_of_them.update(image, text, caption_ids(captions))
    rows = [n for n in range(40) if n % 3]
    captioned.update(image[rows], text[rows], caption_ids([captions[n] for n in rows]))
    assert all_of_them.compute() == captioned.compute()
    assert all_of_them.captioned == len(rows)
    none = Retrieval()
    none.update(image, text, caption_ids([""] * 40))
    assert none.compute() == {}


@pytest.mark.parametrize("images", [2, 3, 16])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0, 1e4])
def test_ridge_of_images_that_are_all_alike_is_their_token(images, size):
    draw = torch.Generator().manual_seed(0)
    condition, target = (size * torch.randn(1, 17, c, generator=draw) for c in (24, 12))
    ridge = Ridge(PairShape(TokenShape((4, 4), True, 24), TokenShape((4, 4), True, 12)))
    both = condition.expand(images, -1, -1), target.expand(images, -1, -1)
    ridge.fit(lambda: iter([both]))
    made = ridge.predict(condition)
    assert (made - target).abs().max() <= 1e-5 * max(size, 1e-9) * 10


def test_true_tokens_that_are_all_alike_have_no_r2():
    token = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = TokenScores(token.float(), TokenShape((2, 2), True, 6))
    scores.update(torch.randn(3, 5, 6), token.expand(3, -1, -1))
    values = scores.compute()
    assert values["r2"] is values["std_ratio"] is values["variance_ratio"] is None
    assert -1 <= values["cosine"] <= 1


def test_lists_hold_several_captions(tmp_path: Path) -> None:
    rows = [
        {"path": "a.jpg", "caption": ["a red seven", "", "a seven"], "title": "no"},
        {"path": "b.jpg", "caption": [], "text": ["a two"]},
        {"path": "c.jpg"},
    ]
    table = tmp_path / "list.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [item.captions for item in table_items(table)[0] if isinstance(item, Item)]
    assert found == [("a red seven", "a seven"), ("a two",), ()]
    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.json").write_text(json.dumps({"caption": ["a red seven", "a seven"]}))
    (tmp_path / "b.txt").write_text("a two")
    items = read_folder(tmp_path).items
    assert [i.captions for i in items if isinstance(i, Item)] == [
        ("a red seven", "a seven"),
        ("a two",),
    ]
