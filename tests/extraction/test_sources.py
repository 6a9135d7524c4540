"""Nothing is skipped in silence: pictures of folders and tars are stored or named, always."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
import re
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from blip3o_lit.config.errors import UserError
from blip3o_lit.config.extract import EngineConfig, ExtractConfig
from blip3o_lit.extraction.engine import extract
from blip3o_lit.images.item import EXTENSIONS, Item, Lost, Reject
from blip3o_lit.images.names import UNREAD, plain
from blip3o_lit.images.open import open_source
from blip3o_lit.towers import demo

UNREADABLE = sorted(set(UNREAD) - set(EXTENSIONS))


def png(number=0):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def put(archive, name, content=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    archive.addfile(info, io.BytesIO(content))


def make_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as archive:
        for member in members:
            put(archive, *member)
    return path


def read(source):
    """Return the bytes of stored pictures and the reasons of all else, by source."""
    stored, rejected = {}, {}
    for entry in [*(e for part in source.parts for e in part.entries()), *source.beside]:
        if isinstance(entry, Item):
            assert entry.source not in stored
            try:
                stored[entry.source] = entry.read()
                continue
            except Reject as error:
                entry = Lost(entry.source, str(error))
        rejected[entry.source] = entry.reason
        assert plain(entry.source) == entry.source
    return stored, rejected


def captions(source):
    entries = [e for part in source.parts for e in part.entries() if isinstance(e, Item)]
    return {entry.source: entry.caption for entry in entries}


# tars

WORDS = st.text("ab.1 é[", min_size=1, max_size=6)
NAMES = st.builds(
    lambda folder, word, extension: f"{folder}{word}.{extension}",
    st.sampled_from(["", "d/", "./", "d.x/", "__MACOSX/", "./d/"]),
    st.one_of(WORDS, WORDS.map("._".__add__)),
    st.sampled_from(["png", "PNG", "jpg", "txt", "json", "cls", "md", "npy", "heic", "pkl", "zip"]),
)
KINDS = st.sampled_from(
    [tarfile.REGTYPE] * 6 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(st.tuples(NAMES, KINDS), max_size=12), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.data(),
)
def test_every_picture_of_a_tar_is_stored_or_named(tmp_path_factory, tars, ordered, form, data):
    path = tmp_path_factory.mktemp("tars") / "a.tar"
    given_names, contents = [], {}
    for members in tars:  # `cat`: one file of several tars, each with its own end mark
        members = sorted(members) if ordered else members
        one = path.with_name("one")
        with tarfile.open(one, "w", format=form) as archive:
            for name, kind in members:
                content = png(len(given_names)) if kind == tarfile.REGTYPE else b""
                put(archive, name, content, kind, link="d/a.png")
                clean = Path(name).as_posix()
                if "__MACOSX" in Path(name).parts or Path(name).name.startswith("._"):
                    continue
                if clean.lower().rpartition(".")[2] in (*EXTENSIONS, *UNREAD):
                    given_names.append(f"a.tar/{clean}")
                    contents.setdefault(given_names[-1], content)
        with open(path, "ab") as file:
            file.write(one.read_bytes())
    source = open_source(str(path), 8)
    entries = list(source.parts[0].entries())
    images = [e.source for e in entries if isinstance(e, Item) or e.image]
    texts = [e.source for e in entries if isinstance(e, Lost) and "no picture of this" in e.reason]
    assert sorted(images) == sorted([*given_names, *texts])  # given = stored + rejected
    for entry in entries:
        if isinstance(entry, Item) and contents[entry.source]:
            assert entry.read() == contents[entry.source]
    skip = data.draw(st.integers(0, len(entries)))
    rest = list(source.parts[0].entries(skip))
    assert [e.source for e in rest] == [e.source for e in entries[skip:]]


def test_names_with_dots_keep_their_own_captions(tmp_path):
    names = ["IMG_2024.01.05", "IMG_2024.01.06", "IMG_2024", "v1", "v1.5", "v1.5.1", "./e/x.1"]
    members = []
    for number, name in enumerate(names):
        members += [(f"{name}.png", png(number)), (f"{name}.txt", f"caption {number}".encode())]
    source = open_source(str(make_tar(tmp_path / "a.tar", members)), 8)
    expected = {f"a.tar/{Path(n)}.png": f"caption {k}" for k, n in enumerate(names)}
    assert captions(source) == expected


def test_a_caption_with_more_suffixes_belongs_to_the_only_picture(tmp_path):
    members = [("0.png", png()), ("0.caption.txt", b"a"), ("1.left.png", png(1))]
    members += [("1.right.png", png(2)), ("1.txt", b"both"), ("2.jpg", png(3)), ("2.jpg.txt", b"c")]
    source = open_source(str(make_tar(tmp_path / "a.tar", members)), 8)
    assert list(captions(source).values()) == ["a", "both", "both", "c"]


def test_hard_links_are_the_picture_again_and_other_links_are_named(tmp_path):
    members = [("a.png", png()), ("b.png", b"", tarfile.LNKTYPE, "./a.png")]
    members += [("c.png", b"", tarfile.LNKTYPE, "b.png"), ("d.png", b"", tarfile.SYMTYPE, "a.png")]
    members += [("e.png", b"", tarfile.LNKTYPE, "none.png")]
    stored, rejected = read(open_source(str(make_tar(tmp_path / "x.tar", members)), 8))
    assert stored == dict.fromkeys(("x.tar/a.png", "x.tar/b.png", "x.tar/c.png"), png())
    assert rejected == {
        "x.tar/d.png": "a link or special file",
        "x.tar/e.png": "a hard link to none.png: its content stands there",
    }


def test_tars_without_pictures_and_odd_names_are_named(tmp_path):
    (tmp_path / "blank.tar").write_bytes(b"\0" * 10240)
    make_tar(tmp_path / "notes.tar", [("a.md", b"x"), ("b.npy", b"x"), ("._c.png", b"x")])
    members = [("caf\xe9.png", png()), ("two\nlines.png", png(1))]
    make_tar(tmp_path / "odd.tar", members, format=tarfile.GNU_FORMAT, encoding="latin-1")
    stored, rejected = read(open_source(f"{tmp_path}/*.tar", 8))
    assert set(stored) == {"odd.tar/caf\\xe9.png", "odd.tar/two\\nlines.png"}
    assert rejected["blank.tar"] == "an empty tar"
    assert "2 files that are no pictures (.md, .npy); 1 companions" in rejected["notes.tar"]


@pytest.mark.parametrize("press", [gzip, bz2, lzma])
def test_a_compressed_tar_by_a_plain_name_is_said_to_be_one(tmp_path, press):
    file = make_tar(tmp_path / "a.tar", [("0.png", png())])
    file.write_bytes(press.compress(file.read_bytes()))
    with pytest.raises(UserError, match="a.tar: it is compressed"):
        read(open_source(str(file), 8))


def test_what_follows_an_end_mark_must_be_a_tar(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("a.png", png())])
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0" * 100)  # less than a header
    assert len(read(open_source(str(path), 8))[0]) == 1
    for rest in (b"x" * 512, whole[:700]):
        path.write_bytes(whole + rest)
        with pytest.raises(UserError, match=r"a\.tar.*(what follows|damaged|unexpected)"):
            read(open_source(str(path), 8))


# folders


def fill(folder, seed):
    """Make a random tree of good and odd entries; returns the names of all its pictures."""
    rng = random.Random(seed)
    places, pictures, odd = [folder], [], 0
    for _ in range(rng.randrange(12)):
        place = rng.choice(places) / rng.choice(["a", "b.c", "x.png", "y.tar", "ö"])
        if not place.exists():
            place.mkdir()
            places.append(place)
    for number in range(rng.randrange(60)):
        extension = rng.choice(["png", "JPG", "webp", rng.choice(UNREADABLE), "md", "txt", ""])
        path = rng.choice(places) / f"{number}.v{number % 3}.{extension}".rstrip(".")
        kind = rng.choice(["file"] * 5 + ["pipe", "dangling", "loop", "socket", "bytes"])
        if kind == "file":
            path.write_bytes(png(number))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "dangling":
            path.symlink_to("nowhere")
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "socket":
            os.mknod(path, stat.S_IFSOCK | 0o600)
        else:
            path = Path(
                os.fsdecode(os.fsencode(path.with_suffix("")) + b"\xe9" + os.fsencode(path.suffix))
            )
            path.write_bytes(png(number))
        if path.suffix[1:].lower() in (*EXTENSIONS, *UNREAD):
            pictures.append(plain(path.relative_to(folder).as_posix()))
        odd += kind != "file"
    return pictures, odd


@pytest.mark.parametrize("seed", range(40))
def test_every_picture_of_a_folder_is_stored_or_named(tmp_path, seed):
    pictures, _ = fill(tmp_path, seed)
    readable = [name for name in pictures if name.lower().rpartition(".")[2] in EXTENSIONS]
    if not readable:
        with pytest.raises(UserError, match="holds no"):
            open_source(str(tmp_path), 8)
        return
    source = open_source(str(tmp_path), 8)
    stored, rejected = read(source)
    lost = set(rejected) - {entry.source for entry in source.beside}
    assert sorted([*stored, *lost]) == sorted(pictures)
    assert source.length == len(pictures)
    assert len(stored) >= 1 or len(lost) == len(pictures)


def test_links_hidden_files_companions_and_others_are_counted(tmp_path):
    photos = tmp_path / "photos"
    for name in ("a.png", "x.png/b.png", ".git/c.png", "__MACOSX/d.png", "elsewhere/e.png"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(png())
    (photos / "elsewhere").rename(tmp_path / "elsewhere")
    (photos / "link").symlink_to(tmp_path / "elsewhere")
    (photos / "round").symlink_to(photos)
    for name in ("._a.png", "notes.md", "a.txt", "b.txt", ".hidden.png", "more.zip"):
        (photos / name).write_bytes(b"words")
    source = open_source(str(photos), 8)
    stored, rejected = read(source)
    assert set(stored) == {"a.png", "x.png/b.png"}
    assert captions(source) == {"a.png": "words", "x.png/b.png": ""}
    assert set(rejected) == {"link", "round", "x.png", "more.zip", "photos"}
    assert "2 files that are no pictures" in rejected["photos"]
    assert "2 companions" in rejected["photos"]
    assert "2 hidden files or folders" in rejected["photos"]
    before = source.fingerprint
    (photos / "later.md").write_bytes(b"x")
    assert open_source(str(photos), 8).fingerprint == before


def test_captions_beside_a_picture_bear_its_stem_or_its_whole_name(tmp_path):
    for name in ("a.png", "a.jpg", "b.c.png", "d.png"):
        (tmp_path / name).write_bytes(png())
    for name in ("a.txt", "a.jpg.txt", "b.c.png.caption", "d.png.json", "d.caption"):
        (tmp_path / name).write_text("{}" if name.endswith("json") else name)
    source = open_source(str(tmp_path), 8)
    expected = {"a.png": "a.txt", "a.jpg": "a.jpg.txt", "b.c.png": "b.c.png.caption"}
    assert captions(source) == {**expected, "d.png": "d.caption"}
    assert not source.beside


def test_a_caption_in_another_encoding_is_named_in_folders_and_tars(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "a.txt").write_bytes("größer".encode("latin-1"))
    (beside,) = open_source(str(folder), 8).beside
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.png", "a.txt"):
            archive.add(folder / name, name)
    source = open_source(str(tmp_path / "a.tar"), 8)
    entries = [entry for part in source.parts for entry in part.entries()]
    (named,) = [entry for entry in entries if isinstance(entry, Lost)]
    assert (beside.source, named.source) == ("a.txt", "a.tar/a.txt")
    assert "another encoding than UTF-8" in beside.reason == named.reason
    assert len(captions(source)) == 1


def test_a_table_among_pictures_is_named_with_the_words_that_read_it(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "seven"}')
    (beside,) = open_source(str(tmp_path), 8).beside
    assert beside.source == "metadata.jsonl"
    (words,) = re.findall("images=(.*) reads", beside.reason)
    assert captions(open_source(words, 8)) == {"a.png": "seven"}


def test_a_tree_deeper_than_paths_may_be_long_is_read_as_far_as_it_goes(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    stored, rejected = read(open_source(str(tmp_path), 8))
    assert set(stored) == {"a.png"}
    (reason,) = rejected.values()
    assert "can't be listed (File name too long)" in reason


def test_tars_beside_pictures_are_read_with_them(tmp_path):
    (tmp_path / "teaser.png").write_bytes(png())
    (tmp_path / "sub").mkdir()
    for name in ("0.tar", "sub/0.tar"):
        make_tar(tmp_path / name, [("x.png", png(1))])
    os.mkfifo(tmp_path / "pipe.tar")
    stored, rejected = read(open_source(str(tmp_path), 8))
    assert len(stored) == 3
    assert rejected == {"pipe.tar": "no regular file"}


def test_a_word_is_a_table_tars_or_a_folder_by_what_it_ends_in(tmp_path):
    folder = tmp_path / "old.tar_files[1]"
    folder.mkdir()
    (folder / "a.png").write_bytes(png())
    (folder / "list.csv").write_text("path\na.png\n")
    make_tar(folder / "t*.tar", [("b.png", png())])
    assert set(read(open_source(f"{folder}/list.csv", 8))[0]) == {"a.png"}
    assert set(read(open_source(f"{folder}/t*.tar", 8))[0]) == {"t*.tar/b.png"}
    assert set(read(open_source(f"{folder}/*.tar", 8))[0]) == {"t*.tar/b.png"}
    with pytest.raises(UserError, match="is no folder"):
        open_source(f"{folder}/a.png", 8)
    os.mkfifo(folder / "p.tar")
    for words in (f"{folder}/*.tar", f"{folder}/p.tar"):
        with pytest.raises(UserError, match=r"p\.tar is no file"):
            open_source(words, 8)


# the whole way


@pytest.fixture(scope="module")
def towers():
    return {name: demo.load(name) for name in demo.NAMES}


def settings_of(**changes):
    engine = EngineConfig(batch_size=4, shard_samples=4, threads=2, device="cpu")
    return ExtractConfig(extract=engine, **changes)


def test_a_store_below_its_pictures_is_no_source_of_them(tmp_path, towers):
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        make_tar(data / f"{number}.tar", [(f"{number}{n}.png", png(n)) for n in range(5)])
        (data / f"{number}.png").write_bytes(png(number))
    out = data / "tokens"
    first = open_source(str(data), 4, out=str(out))
    outcome = extract(first, towers, out, settings_of())
    assert (outcome.index.samples, outcome.index.rejects) == (18, 0)
    again = open_source(str(data), 4, out=str(out))
    assert extract(again, towers, out, settings_of()).already
    assert "own store" in again.beside[0].reason
    other = open_source(str(data), 4, out=str(tmp_path / "other"))
    assert other.fingerprint == first.fingerprint
    assert [entry.reason for entry in other.beside] == ["a token store is not read"]
    assert len(open_source(f"{data}/**/*.tar", 4, out=str(out)).parts) == 3
    with pytest.raises(UserError, match="is a token store: data.tokens="):
        open_source(str(out), 4)
    with pytest.raises(UserError, match="out=.*data is"):
        open_source(str(data), 4, out=str(data))
    with pytest.raises(UserError, match="out=.*data is"):
        open_source(f"{data}/*.tar", 4, out=str(data))


def test_stored_and_rejected_are_given_by_the_real_command(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    pictures, odd = fill(photos, 14)
    assert odd > 4
    make_tar(photos / "a.tar", [("v.1.png", png(1)), ("v.2.png", png(2)), ("v.3.heic", b"x")])
    pictures += ["a.tar/v.1.png", "a.tar/v.2.png", "a.tar/v.3.heic"]
    out = tmp_path / "out"
    words = [f"images={photos}", f"out={out}", "max_reject_fraction=1", "extract.device=cpu"]
    command = [sys.executable, "-m", "blip3o_lit.extract", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    index = json.loads((out / "index.json").read_text())
    lines = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert index["samples"] + index["rejects"] == len(pictures)
    lost = {line["source"] for line in lines if line["image"]}
    assert len(lost) == index["rejects"]
    assert lost < set(pictures)
    account = f"{len(pictures)}: {index['samples']} stored, {index['rejects']} rejected"
    assert account in done.stdout
    assert "images, 0 with a caption and 1 tars;" in done.stdout


def test_early_losses_do_not_end_what_is_sound_as_a_whole(tmp_path, towers):
    for number in range(1018):
        broken = number < 1010
        (tmp_path / f"{number:04d}.png").write_bytes(b"broken" if broken else png(number))
    source = open_source(str(tmp_path), 4)
    outcome = extract(source, towers, tmp_path / "out", settings_of(max_reject_fraction=0.995))
    assert (outcome.index.samples, outcome.index.rejects) == (8, 1010)
    with pytest.raises(UserError, match=r"of 1018 images.*0000\.png: cannot identify"):
        extract(source, towers, tmp_path / "b", settings_of(max_reject_fraction=0.9))
