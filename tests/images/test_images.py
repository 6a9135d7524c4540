"""Sources of images: folders, tables, tars; decoding of hostile files; the split by looks."""

import csv
import functools
import http.server
import io
import json
import os
import struct
import tarfile
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hub_server import serving
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images

from blip3o_lit.base.remote import open_remote, resumed
from blip3o_lit.config.errors import UserError
from blip3o_lit.images import item as items
from blip3o_lit.images.item import Item, Lost, Reject, decode, slices
from blip3o_lit.images.open import open_source
from blip3o_lit.images.split import Splitter, fingerprint


def jpeg(seed=0, size=(40, 30), kind="JPEG", **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(buffer, kind, **options)
    return buffer.getvalue()


def read_all(source):
    return [entry for part in source.parts for entry in part.entries()]


def make_tar(path, members, end=True):
    """Write a tar of (name, bytes) or (TarInfo, bytes)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))
        size = archive.offset
    if not end:
        path.write_bytes(path.read_bytes()[:size])
    return path


# folders


def test_a_folder_is_read_recursively_in_a_fixed_order_with_captions_beside(tmp_path):
    for name in ("b/x.JPG", "a.png", "b/.hidden.jpg", ".git/y.jpg", "notes.md"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg(kind="PNG" if name.endswith("png") else "JPEG"))
    (tmp_path / "b" / "x.txt").write_text(" a red seven \n")
    source = open_source(str(tmp_path), 8)
    entries = read_all(source)
    assert [entry.source for entry in entries] == ["a.png", "b/x.JPG"]
    assert [entry.caption for entry in entries] == ["", "a red seven"]
    assert source.captions
    assert source.length == 2
    assert decode(entries[1].read()).size == (40, 30)
    before = source.fingerprint
    (tmp_path / "b" / "z.jpg").write_bytes(jpeg(1))
    assert open_source(str(tmp_path), 8).fingerprint != before


def test_a_folder_without_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no .jpg"):
        open_source(str(tmp_path), 8)
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "no"), 8)


# tables


def test_csv_and_jsonl_give_paths_captions_and_splits(tmp_path):
    (tmp_path / "one.jpg").write_bytes(jpeg())
    listed = [
        {"path": "one.jpg", "caption": "a, b", "split": "val", "label": "cat"},
        {"path": "gone.jpg", "caption": "", "split": "train"},
        {"path": "", "caption": "", "split": ""},
        {"path": "one.jpg", "caption": "again", "split": "train"},
        {"path": "https://x.org/a.jpg", "caption": "", "split": ""},
    ]
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "caption", "split", "label"])
        writer.writeheader()
        writer.writerows(listed)
    lines = "\n".join(json.dumps(row) for row in listed)
    (tmp_path / "list.jsonl").write_text(lines + "\n")
    for name in ("list.csv", "list.jsonl"):
        source = open_source(str(tmp_path / name), 8)
        found = {entry.source: entry for entry in read_all(source)}
        assert found["one.jpg"].caption == "a, b"
        assert found["one.jpg"].split == "validation"
        assert found["one.jpg"].extra == {"label": "cat"}
        assert found["gone.jpg"].extra == {}
        with pytest.raises(Reject, match="missing"):
            found["gone.jpg"].read()
        reasons = " ".join(e.reason for e in found.values() if isinstance(e, Lost))
        for word in ("no path", "listed twice", "download it first"):
            assert word in reasons
        assert source.split_rule == "given by the table"


def test_broken_tables_are_refused_or_counted(tmp_path):
    table = tmp_path / "list.jsonl"
    table.write_text('{"path": "a.jpg"}\nnonsense\n[1]\n')
    assert [type(e) for e in read_all(open_source(str(table), 8))].count(Lost) == 2
    table.write_text('{"url": "a.jpg"}\n')
    with pytest.raises(UserError, match="no column of paths"):
        open_source(str(table), 8)
    table.write_bytes(b'{"path": "a.jpg"}\n{"path": "caf\xe9.jpg"}\n')
    with pytest.raises(UserError, match="line 2 is not UTF-8"):
        open_source(str(table), 8)


def test_a_split_file_wins(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(jpeg())
    splits = tmp_path / "splits.csv"
    splits.write_text("path,split\nb.jpg,validation\n")
    found = {e.source: e.split for e in read_all(open_source(str(tmp_path), 8, str(splits)))}
    assert found == {"a.jpg": "", "b.jpg": "validation"}
    make_tar(tmp_path / "t.tar", [("b.jpg", jpeg())])
    splits.write_text("path,split\nt.tar/b.jpg,test\n")
    (entry,) = read_all(open_source(str(tmp_path / "t.tar"), 8, str(splits)))
    assert entry.split == "test"
    splits.write_text("path\nb.jpg\n")
    with pytest.raises(UserError, match="line 2 lacks"):
        open_source(str(tmp_path), 8, str(splits))


def test_parts_of_given_splits_hold_one_split_each():
    rows = [Item(f"{n}.jpg", bytes, split="train" if n % 3 else "validation") for n in range(20)]
    parts = slices(list(rows), 4)
    assert sum(part.length for part in parts) == 20
    for part in parts:
        assert {entry.split for entry in part.entries()} == {part.split}


# tars


def test_tars_group_members_by_name_and_can_be_entered_anywhere(tmp_path):
    members = []
    for n in range(7):
        members.append((f"dir/{n:03d}.jpg", jpeg(n)))
        extension, text = [("txt", "cap"), ("caption", "cap"), ("json", '{"caption": "cap"}')][
            n % 3
        ]
        members.append((f"dir/{n:03d}.{extension}", text.encode()))
        members.append((f"dir/{n:03d}.cls", b"1"))
        if n == 2:
            members.append(("dir/002.pkl", b"boom"))
    members.insert(3, ("dir/evil.pyd", b"x"))
    (part,) = open_source(str(make_tar(tmp_path / "a.tar", members)), 8).parts
    entries = list(part.entries())
    images = [entry for entry in entries if isinstance(entry, Item)]
    assert [entry.source for entry in images] == [f"a.tar/dir/{n:03d}.jpg" for n in range(7)]
    assert {entry.caption for entry in images} == {"cap"}
    assert {entry.extra["label"] for entry in images} == {"1"}
    lost = [entry for entry in entries if isinstance(entry, Lost)]
    assert [entry.source for entry in lost] == ["a.tar/dir/evil.pyd", "a.tar/dir/002.pkl"]
    assert not any(entry.image for entry in lost)
    for skip in range(len(entries) + 1):
        rest = list(part.entries(skip))
        assert [e.source for e in rest] == [e.source for e in entries[skip:]]
        for a, b in zip(rest, entries[skip:]):
            if isinstance(a, Item):
                assert a.read() == b.read()
                assert a.caption == b.caption


def test_links_paths_outside_and_repeated_names_are_named(tmp_path):
    link = tarfile.TarInfo("link.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("ok.jpg", jpeg()),
        (link, b""),
        ("../up.jpg", jpeg()),
        ("/abs.jpg", jpeg()),
        ("only.txt", b"no image"),
        ("ok.jpg", jpeg(1)),
    ]
    (part,) = open_source(str(make_tar(tmp_path / "a.tar", members)), 8).parts
    found = [(e.source, e.reason if isinstance(e, Lost) else "image") for e in part.entries()]
    assert found == [
        ("a.tar/ok.jpg", "image"),
        ("a.tar/link.jpg", "a link or special file"),
        ("a.tar/../up.jpg", "its path leaves the folder"),
        ("a.tar//abs.jpg", "its path leaves the folder"),
        (
            "a.tar/only.txt",
            "no picture of this name beside it; `tar --sort=name` keeps the two together",
        ),
        ("a.tar/ok.jpg", "its name appears twice in the tar"),
    ]


@pytest.mark.parametrize("cut", [1500, 512 * 5, -1024])
def test_cut_and_damaged_tars_stop_the_run(tmp_path, cut):
    path = make_tar(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(n)) for n in range(4)], end=False)
    path.write_bytes(path.read_bytes()[:cut])
    (part,) = open_source(str(path), 8).parts
    with pytest.raises(UserError, match="a.tar.*download it again"):
        list(part.entries())


def test_a_damaged_header_in_the_middle_does_not_end_a_tar_silently(tmp_path):
    path = make_tar(tmp_path / "a.tar", [("0.jpg", jpeg(0)), ("1.jpg", jpeg(1))])
    content = bytearray(path.read_bytes())
    second = 512 + -(-len(jpeg(0)) // 512) * 512
    content[second : second + 8] = b"\xff" * 8
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged or cut off"):
        list(open_source(str(path), 8).parts[0].entries())


def test_an_absurd_size_is_named_before_it_is_read(tmp_path):
    info = tarfile.TarInfo("0.jpg")
    info.size = items.MAX_BYTES + 1
    path = tmp_path / "a.tar"
    path.write_bytes(info.tobuf())
    os.truncate(path, 512 + items.MAX_BYTES + 1024)  # a hole: no such bytes lie on the disk
    (entry,) = open_source(str(path), 8).parts[0].entries()
    assert f"{items.MAX_BYTES} is the limit" in entry.reason


def test_braces_and_stars_name_several_tars_in_order(tmp_path):
    for n in range(3):
        make_tar(tmp_path / f"{n}.tar", [(f"{n}.jpg", jpeg(n))])
    for words in (f"{tmp_path}/{{0..2}}.tar", f"{tmp_path}/*.tar", str(tmp_path)):
        found = read_all(open_source(words, 8))
        assert [entry.source for entry in found] == ["0.tar/0.jpg", "1.tar/1.jpg", "2.tar/2.jpg"]
    with pytest.raises(UserError, match="3.tar does not exist"):
        open_source(f"{tmp_path}/{{2..3}}.tar", 8)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("pipe:cat x.tar", "pipes"),
        ("simplecache::https://x.org/a.tar", "pipes and chained"),
        ("ftp://x.org/a.tar", "choose from http"),
        ("x.tar.gz", "compressed"),
        ("none.tar", "does not exist"),
        ("none/*.tar", "matches nothing"),
    ],
)
def test_other_addresses_are_refused(words, says):
    with pytest.raises(UserError, match=says):
        open_source(words, 8)


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


def test_remote_tars_are_streamed_and_a_broken_connection_is_taken_up_again(tmp_path):
    path = make_tar(tmp_path / "a.tar", [(f"{n}.jpg", jpeg(n, (200, 200))) for n in range(6)])
    broken = []

    class Flaky(Quiet):
        def copyfile(self, source, outputfile):
            if broken:
                super().copyfile(source, outputfile)
            else:
                broken.append(1)
                outputfile.write(source.read(path.stat().st_size // 2))

    handler = functools.partial(Flaky, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (part,) = open_source(f"http://127.0.0.1:{server.server_address[1]}/a.tar", 8).parts
        found = [entry.source for entry in replace(part, pauses=(0.0,)).entries()]
        server.shutdown()
    assert broken == [1]
    assert found == [f"a.tar/{n}.jpg" for n in range(6)]


def test_tars_behind_http_are_read_and_a_missing_one_is_named_at_once(tmp_path):
    for n in range(2):
        make_tar(tmp_path / f"{n}.tar", [(f"{m}.jpg", jpeg(m)) for m in range(3)])
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        found = read_all(open_source(f"{url}/{{0..1}}.tar", 8))
        assert [entry.source for entry in found] == [
            f"{n}.tar/{m}.jpg" for n in "01" for m in "012"
        ]
        assert found[4].read() == jpeg(1)
        assert [e.source for e in open_source(f"{url}/0.tar", 8).parts[0].entries(2)] == [
            "0.tar/2.jpg"
        ]
        (part,) = open_source(f"{url}/7.tar", 8).parts
        with pytest.raises(UserError, match=r"7\.tar can't be read"):
            list(replace(part, pauses=(1e6,)).entries())  # a pause would never end
        server.shutdown()


@pytest.mark.parametrize("names", ["{0..1}.tar", "*.tar"])
def test_tars_of_the_hub_are_read_in_place(tmp_path, names):
    for n in range(2):
        make_tar(tmp_path / f"{n}.tar", [(f"{m}.jpg", jpeg(m)) for m in range(3)])
    with serving(tmp_path / "cache") as hub:
        hub.repositories[f"org/{len(names)}"] = {  # the client remembers a repository's files
            f"{n}.tar": (tmp_path / f"{n}.tar").read_bytes() for n in range(2)
        }
        found = read_all(open_source(f"hf://datasets/org/{len(names)}/{names}", 8))
        assert [entry.source for entry in found] == [
            f"{n}.tar/{m}.jpg" for n in "01" for m in "012"
        ]
        assert found[4].read() == jpeg(1)


@pytest.mark.parametrize("url", ["hf://datasets/none/none/0.tar", "s3://none/0.tar"])
def test_what_can_not_be_reached_is_one_line(url, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    (part,) = open_source(url, 8).parts
    with pytest.raises(UserError, match=url[:8]) as caught:
        list(replace(part, pauses=(0.0,)).entries())
    assert "\n" not in str(caught.value)


# hostile images


def bomb(width, height):
    """A PNG of a few hundred bytes that claims width x height pixels."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def test_hostile_and_damaged_images_are_rejected_with_a_reason():
    icon = io.BytesIO()
    Image.new("RGB", (16, 16)).save(icon, "ICO")
    cases = {
        b"": "cannot identify",
        b"not an image": "cannot identify",
        icon.getvalue(): "cannot identify",
        jpeg(size=(300, 300))[:2000]: "truncated",
        bomb(60_000, 60_000): "bomb|pixels",
        bomb(12_000, 9_000): "decompression bomb",
        bomb(100, 100): "truncated|broken|not enough",
    }
    for content, says in cases.items():
        with pytest.raises(Reject, match=f"(?i){says}") as caught:
            decode(content)
        assert "0x" not in str(caught.value)  # reasons must not differ from run to run


def test_keys_are_plain_and_differ_where_sources_do():
    names = ["a b/ü.x.jpg", "a/ü.x.jpg", "x" * 200 + ".jpg", ".jpg", "a/1.png", "a/1.jpg"]
    keys = [Item(name, bytes).sample_key for name in names]
    assert len(set(keys)) == len(names)
    assert all(0 < len(key) <= 60 and key.isascii() and "." not in key for key in keys)


def test_huge_files_are_not_read(tmp_path):
    (tmp_path / "a.jpg").touch()
    os.truncate(tmp_path / "a.jpg", items.MAX_BYTES + 1)
    with pytest.raises(Reject, match=f"{items.MAX_BYTES + 1} bytes"):
        items.file_bytes(tmp_path / "a.jpg")


# the split by looks


def photographs(count=120):
    """Random crops of scikit-learn's two photographs."""
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(picture) for picture in load_sample_images().images]
    for n in range(count):
        side = int(rng.integers(120, 400))
        left, top = int(rng.integers(0, 640 - side)), int(rng.integers(0, 427 - side))
        yield pictures[n % 2].crop((left, top, left + side, top + side))


def copies(image):
    """The same picture, as it comes around again: other quality, size and format."""
    for size, kind, options in (
        (image.size, "JPEG", {"quality": 60}),
        ((160, 160), "JPEG", {"quality": 85}),
        ((301, 300), "WEBP", {"quality": 80}),
    ):
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, kind, **options)
        yield decode(buffer.getvalue())


def test_near_identical_files_do_not_straddle_the_split():
    splitter = Splitter("perceptual", 0.5, 0)
    straddling = pairs = held_out = 0
    for image in photographs(60):
        split = splitter(image)
        held_out += split == "validation"
        for copy in copies(image):
            pairs += 1
            straddling += splitter(copy) != split
    assert 0.2 < held_out / 60 < 0.8
    # 0.5 is the worst fraction: with the default 0.05 five times fewer copies part.
    assert straddling / pairs < 0.08, straddling / pairs


def test_exact_copies_never_straddle_and_seeds_hold_other_images_out():
    for rule in ("perceptual", "content"):
        splits = []
        for seed in (0, 1):
            splitter = Splitter(rule, 0.5, seed)
            found = []
            for image in photographs(16):
                buffer = io.BytesIO()
                image.save(buffer, "PNG")
                assert splitter(decode(buffer.getvalue())) == splitter(image)
                found.append(splitter(image))
            splits.append(found)
        assert splits[0] != splits[1]


def test_fractions_are_kept_for_unlike_images():
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)).resize((48, 48))
        for _ in range(1500)
    ]
    share = np.mean([Splitter("perceptual", 0.1, 0)(image) == "validation" for image in images])
    assert 0.07 < share < 0.13
    assert len({fingerprint(image) for image in images}) > 1000


def test_bad_split_options_are_refused():
    with pytest.raises(UserError, match="split.by=percep"):
        Splitter("percep", 0.1, 0)
    with pytest.raises(UserError, match="split.fraction"):
        Splitter("content", 1.5, 0)


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


def test_a_missing_file_is_not_asked_for_again(tmp_path):
    url = f"file://{tmp_path}/none.tar"
    with pytest.raises(UserError, match=r"none.tar can't be read \(it is not there\)"):
        list(resumed(lambda _: iter([open_remote(url)]), url))
