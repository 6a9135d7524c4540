"""The seeds' pickles: every variant reads as torch and NumPy would, and nothing in a file runs."""

from __future__ import annotations

import copyreg
import json
import os
import pickle
import pickletools
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_pickles import SEEDS, check_only_user_errors, embeddings
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blip3o_lit.config.errors import UserError
from blip3o_lit.seeds.arrays import as_array, float_rows
from blip3o_lit.seeds.embeddings import LegacyFile
from blip3o_lit.seeds.folder import legacy_files, manifest_problems
from blip3o_lit.seeds.pickles import read_pickle

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage")


def saved(path: Path, data: Any, protocol: int = pickle.HIGHEST_PROTOCOL) -> Path:
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


def opened(path: Path, mode: str = "auto") -> tuple[np.ndarray, np.ndarray]:
    file = LegacyFile(path, mode)
    sides = [file.sides[name] for name in ("eva", "clip")]
    eva, clip = (
        np.concatenate([side.rows(i, i + 1) for i in range(file.samples)]) for side in sides
    )
    assert np.array_equal(sides[0].rows(0, file.samples), eva)
    return eva, clip


BASE = torch.randn(10, 4, 3, generator=torch.Generator().manual_seed(0))
PLAIN = BASE[:5].numpy().copy()
ARRAYS = {
    "float32": BASE,
    "float16": BASE.half(),
    "bfloat16": BASE.bfloat16(),
    "float64": BASE.double(),
    "permuted": BASE.permute(2, 0, 1),
    "slice of a larger storage": BASE[2:7],
    "every other row": BASE[::2],
    "with gradient": BASE.clone().requires_grad_(),
    "numpy": PLAIN,
    "numpy Fortran order": np.asfortranarray(PLAIN),
    "numpy transposed": PLAIN.transpose(1, 2, 0),
    "numpy strided": PLAIN[::2],
    "numpy big-endian": PLAIN.astype(">f4"),
    "numpy float16": PLAIN.astype("f2"),
    "numpy float64": PLAIN.astype("f8"),
}


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_values_read_as_pickle_reads_them(tmp_path: Path, protocol: int) -> None:
    values = {
        "text": ["a", "\u00e9\u4e2d\n\\", "\ud800", "x" * 70000],
        "numbers": [0, -5, 255, 256, 70000, 2**31, -(2**40), 2**100, 1.5, True, False, None],
        "tuples": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "nested": {"a": {"b": []}, 3: [{}]},
    }
    path = saved(tmp_path / "x.pkl", {**values, **ARRAYS}, protocol)
    read = read_pickle(path)
    for name, array in ARRAYS.items():
        expected = array.detach().float().numpy() if torch.is_tensor(array) else array
        found = as_array(read[name])
        rows = [float_rows(found, i, i + 1) for i in range(found.shape[0])]
        assert np.array_equal(np.concatenate(rows), expected.astype("f4")), name
        assert np.array_equal(float_rows(found, 1, 3), expected[1:3].astype("f4")), name
    assert {key: read[key] for key in values} == values


def test_single_file_takes_full_grids_unless_the_averages_are_asked_for(tmp_path: Path) -> None:
    data = embeddings(4, 64)
    data["eva_grid_embeddings"] = torch.randn(4, 16, 16, 4)
    data["clip_grid_embeddings"] = torch.randn(4, 16, 16, 3)
    path = saved(tmp_path / "blip3o_grid_embeddings.pkl", data, 4)
    eva, clip = opened(path)
    assert np.array_equal(eva, data["eva_grid_embeddings"].reshape(4, 256, 4))
    assert np.array_equal(clip, data["clip_grid_embeddings"].reshape(4, 256, 3))
    eva, clip = opened(path, "grid_64")
    assert np.array_equal(eva, data["eva_blip3o_embeddings"])
    file = LegacyFile(path, "grid_64")
    assert file.reduced
    assert file.sides["eva"].shape.grid == (8, 8)
    file = LegacyFile(path)
    assert not file.reduced


@pytest.mark.parametrize("tokens", [64, 256, 257])
@pytest.mark.parametrize("kind", ["torch", "numpy", "zip", "legacy pt", "coco", "batches", "items"])
def test_variants_hold_the_same_tokens(tmp_path: Path, kind: str, tokens: int) -> None:
    data = embeddings(6, tokens)
    eva, clip = data["eva_blip3o_embeddings"], data["clip_blip3o_embeddings"]
    path = tmp_path / ("x.pt" if kind in ("zip", "legacy pt") else "x.pkl")
    if kind in ("zip", "legacy pt"):
        torch.save(data, path, _use_new_zipfile_serialization=kind == "zip")
    elif kind == "coco":
        named = {"eva_embeddings": eva, "clip_embeddings": clip, "metadata": {"n": 6}}
        saved(path, {**named, "config": {}})
    elif kind in ("batches", "items"):
        parts = [list(t.split([4, 2]) if kind == "batches" else t) for t in (eva, clip)]
        names = ("eva_blip3o_embeddings_list", "clip_blip3o_embeddings_list")
        info = {"batch_idx": 1, "total_samples": 6}
        saved(path, {**dict(zip(names, parts)), "checkpoint_info": info})
    else:
        arrays = {k: v.numpy() if torch.is_tensor(v) else v for k, v in data.items()}
        saved(path, arrays if kind == "numpy" else data)
    found_eva, found_clip = opened(path)
    assert np.array_equal(found_eva, eva)
    assert np.array_equal(found_clip, clip)
    file = LegacyFile(path)
    assert file.sides["eva"].shape.cls is (tokens == 257)
    assert file.captions == data["captions"] or file.captions == [None] * 6


def test_missing_captions_and_keys_are_none_and_wrong_counts_are_refused(tmp_path: Path) -> None:
    data = embeddings(3)
    del data["captions"], data["keys"]
    file = LegacyFile(saved(tmp_path / "a.pkl", data))
    assert file.captions == file.keys == [None] * 3
    with pytest.raises(UserError, match="captions: 2"):
        LegacyFile(saved(tmp_path / "b.pkl", embeddings(3, captions=["a", "b"])))
    with pytest.raises(UserError, match="keys holds a int"):
        LegacyFile(saved(tmp_path / "c.pkl", embeddings(3, keys=[1, 2, 3])))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eva_blip3o_embeddings": torch.randn(4, 256, 4)}, "4 eva and 5 clip"),
        ({"eva_blip3o_embeddings": torch.randn(5, 100, 4)}, "100 tokens"),
        ({"eva_blip3o_embeddings": torch.randn(5, 64, 4)}, "64, 256"),
        ({"eva_blip3o_embeddings": torch.randn(5, 4)}, "5, 4"),
        ({"eva_blip3o_embeddings": torch.randn(0, 256, 4)}, "0, 256"),
        ({"eva_blip3o_embeddings": np.ones((5, 256, 4), np.int32)}, "int32"),
        ({"eva_blip3o_embeddings": [[1.0, 2.0]]}, "list"),
        ({"eva_blip3o_embeddings": []}, "empty list"),
        ({"eva_blip3o_embeddings": "text"}, "str"),
        ({"eva_blip3o_embeddings": None}, "none of eva"),
        ({"config": {"cls_first": False}}, "cls_first"),
    ],
)
def test_wrong_contents_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    path = saved(tmp_path / "x.pkl", embeddings(5, 256, **changes))
    with pytest.raises(UserError, match=words) as error:
        LegacyFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_memory_is_bounded_by_a_batch(tmp_path: Path) -> None:
    data = embeddings(2, 64, eva_blip3o_embeddings=np.zeros((64, 256, 512), np.float32))
    data["clip_blip3o_embeddings"] = torch.zeros(64, 256, 512)
    data["captions"] = data["keys"] = []
    path = saved(tmp_path / "x.pkl", data)
    assert path.stat().st_size > 60e6
    tracemalloc.start()
    file = LegacyFile(path)
    for row in range(0, 64, 2):
        for side in file.sides.values():
            side.rows(row, row + 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


# Files that want to run something


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


class Mine:
    """A class of ours, pickled the ordinary way."""

    def __init__(self) -> None:
        self.a = 1


def tensor_bytes(payload: bytes) -> Any:
    return Call(torch.storage._load_from_bytes, payload)


def torch_payload(objects: list[Any]) -> bytes:
    """The start of torch's format before 1.6, followed by pickles of our own."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = [0x1950A86A20F9469CFC6C, 1001, system]
    return b"".join(pickle.dumps(item, protocol=2) for item in [*head, *objects])


def hostile(marker: Path) -> dict[str, tuple[Any, str]]:
    """Objects or raw pickles that would create `marker` or call what they must not."""
    touch = f"touch {marker}"
    run = f"open({str(marker)!r}, 'w')"
    shell = Call(os.system, touch)
    word, length = str(marker).encode(), len(touch)
    unicode = b"X" + struct.pack("<I", length) + touch.encode()
    dotted = b"\x80\x04\x8c\x0dtorch.storage\x8c\x1c_load_from_bytes.__globals__\x93)R."
    return {
        "os.system": (shell, r"(posix|nt)\.system"),
        "eval": (Call(eval, run), r"builtin(s|__)\.eval"),
        "exec": (Call(exec, run), r"builtin(s|__)\.exec"),
        "own class": (Mine(), r"Mine|_reconstructor"),
        "getattr chain": (Call(getattr, Call(__import__, "os"), "system"), r"getattr|__import__"),
        "in a tensor": (tensor_bytes(pickle.dumps(shell)), r"system"),
        "after torch's head": (tensor_bytes(torch_payload([shell])), r"system"),
        "in the storage's keys": (tensor_bytes(torch_payload([1, shell])), r"system"),
        "tensor in a tensor": (
            tensor_bytes(pickle.dumps(tensor_bytes(pickle.dumps(shell)))),
            r"_load_from_bytes",
        ),
        "in a list in a dict": ({"eva_blip3o_embeddings": [[{"a": shell}]]}, r"system"),
        "behind good arrays": ({**embeddings(2), "config": {"x": shell}}, r"system"),
        "INST": (b"(" + unicode + b"ios\nsystem\n.", "INST"),
        "OBJ": (b"(cos\nsystem\n" + unicode + b"o.", r"os\.system"),
        "NEWOBJ": (b"\x80\x02cos\nsystem\n)\x81.", r"os\.system"),
        "NEWOBJ of an array": (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        "GLOBAL alone": (b"cos\nsystem\n.", r"os\.system"),
        "dotted name": (dotted, r"__globals__"),
        "dotted in protocol 2": (b"ctorch\nstorage._load_from_bytes\n.", r"torch\.storage"),
        "state for a function": (
            b"c_codecs\nencode\n}(X\x08\x00\x00\x00__code__Nub.",
            "state for something",
        ),
        "state for an array's view": (
            pickle.dumps(torch.zeros(3), protocol=2)[:-1] + b"}U\x01aNsb.",
            "SHORT_BINSTRING",
        ),
        "attributes for a tensor": (
            pickle.dumps(torch.zeros(3), protocol=2)[:-1] + b"}X\x05\x00\x00\x00shapeK\x01sb.",
            "state for something",
        ),
        "attributes for a dict": (b"}}X\x03\x00\x00\x00getK\x01sb.", "state for something"),
        "NumPy scalar of objects": (
            b"cnumpy.core.multiarray\nscalar\n.",
            r"numpy\.core\.multiarray\.scalar",
        ),
        "dtype of objects": (b"cnumpy\ndtype\n(X\x02\x00\x00\x00O8I00\nI01\ntR.", "type O8"),
        "call of a class": (b"\x80\x02cnumpy\nndarray\n(K\x05tR.", r"numpy\.ndarray"),
        "call of text": (b"X\x02\x00\x00\x00os)R.", "no global"),
        "persistent id": (b"\x80\x02X\x01\x00\x00\x00aQ.", "BINPERSID"),
        "persistent id in text": (b"Pabc\n.", "PERSID"),
        "extension": (b"\x80\x02\x82\xf0.", "EXT1"),
        "a codec": (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", "to hex"),
        "other NumPy": (b"cnumpy.testing._private.utils\nrunstring\n.", "runstring"),
        "marker in a global": (b"c" + word + b"\nx\n.", "refused"),
    }


CASES = list(hostile(Path("marker")))


def test_the_hostile_files_are_live(tmp_path: Path) -> None:
    for name in ("os.system", "eval", "exec", "INST", "OBJ", "in a tensor"):
        marker = tmp_path / name.replace(" ", "-")
        payload = hostile(marker)[name][0]
        content = payload if isinstance(payload, bytes) else pickle.dumps(payload)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
            try:
                pickle.loads(content)  # noqa: S301 (shows that the file is dangerous elsewhere)
            except (RuntimeError, AttributeError, TypeError, KeyError):
                assert name == "in a tensor"
        assert marker.exists(), name


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused_and_run_nothing(
    tmp_path: Path, name: str, protocol: int
) -> None:
    marker = tmp_path / "marker"
    payload, words = hostile(marker)[name]
    path = tmp_path / "embeddings_shard_00000.pkl"
    if isinstance(payload, bytes):
        path.write_bytes(payload)
    else:
        saved(path, payload, protocol)
    copyreg.add_extension("os", "system", 240)
    copyreg._extension_cache[240] = os.system  # type: ignore[attr-defined]
    try:
        with pytest.raises(UserError, match=words) as error:
            LegacyFile(path)
    finally:
        copyreg.remove_extension("os", "system", 240)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_hostile_torch_files_are_refused_and_run_nothing(tmp_path: Path) -> None:
    for name in ("os.system", "eval", "exec", "own class", "in a tensor"):
        for zipped in (True, False):
            marker = tmp_path / "marker"
            path = tmp_path / "x.pt"
            torch.save({"a": hostile(marker)[name][0]}, path, _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError, match="refused|safely") as error:
                LegacyFile(path)
            assert "\n" not in str(error.value)
            assert not marker.exists()


@pytest.mark.parametrize(
    "array", [np.array([{"a": 1}], object), np.array([("a", 1)], "U1,i4"), np.array(["a", "b"])]
)
def test_arrays_of_objects_records_and_text_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    for protocol in (2, 4, 5):
        with pytest.raises(UserError):
            LegacyFile(saved(tmp_path / "x.pkl", {"eva_blip3o_embeddings": array}, protocol))


def numpy_state(shape: tuple[Any, ...], protocol: int = 4) -> bytes:
    state = (1, shape, np.dtype("f4"), False, b"1234" * 4)
    start = pickle.dumps(np.zeros(4, "f4"), protocol=2)
    body = start[: start.index(b"(K\x01")]
    return body + pickle.dumps(state, protocol=2)[2:-1] + b"b."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"abc.", "cut off"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.", "cut off"),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**63) + b"abc.", "cut off"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**61) + b"N.", "cut off"),
        (b"\x80\x09N.", "protocol"),
        (b"(((((.", "damaged"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged"),
        (b"}(]Nu.", "dict key"),
        (b"K\x01K\x02a.", "damaged"),
        (b"h\x07.", "Memo value not found"),
        (b"N", "cut off"),
        (b"", "cut off"),
        (numpy_state((2**40,)), "cannot reshape"),
        (numpy_state((2**62, 2**62)), "damaged"),
        (numpy_state((-1, -4)), "damaged"),
        (numpy_state((1,) * 40), "damaged"),
        (numpy_state((1.5,)), "damaged"),
    ],
)
def test_damaged_and_absurd_files_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        LegacyFile(path)


def test_tensors_beyond_or_over_their_own_bytes_are_refused(tmp_path: Path) -> None:
    storage = torch.zeros(12).storage()
    rebuild = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]
    for offset, size, stride in [
        (0, (13,), (1,)),
        (8, (5,), (1,)),
        (0, (3, 4), (5, 1)),
        (0, (10**9, 4), (0, 1)),
        (0, (2,), (2**61,)),
        (0, (3, 2), (2**63, 1)),
        (0, (1,), (2**62,)),
        (0, (0, 2**62), (1, 1)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2, 2), (1,)),
    ]:
        call = Call(rebuild, storage, offset, size, stride, False, {})
        with pytest.raises(UserError, match="damaged|has the shape"):
            LegacyFile(saved(tmp_path / "x.pkl", {"eva_blip3o_embeddings": call}))


def test_hash_bombs_and_self_references_end(tmp_path: Path) -> None:
    bomb: Any = ()
    for _ in range(200):
        bomb = (bomb, bomb)
    path = tmp_path / "x.pkl"
    path.write_bytes(pickletools.optimize(pickle.dumps(bomb)[:-1] + b"}\x8c\x01aNs0."))
    with pytest.raises(UserError, match="no dict of embeddings"):
        LegacyFile(path)
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UserError):
        LegacyFile(saved(path, {"eva_blip3o_embeddings": loop, "captions": loop}))


DEEP = 100_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        # A key whose hash takes for ever, and one whose hash recurses beyond the stack.
        (b"}" + b")" + b"q\x00h\x00\x86" * 200 + b"Ns.", "dict key of type tuple"),
        (b"})" + b"\x85" * DEEP + b"Ns.", "dict key of type tuple"),
        (b"(])" + b"\x85" * DEEP + b"Nd.", "damaged|dict key"),
        (b"]" * DEEP + b"a" * (DEEP - 1) + b".", "no dict of embeddings"),
        (b"(" * DEEP + b"l" * DEEP + b".", "no dict of embeddings"),
        # The C unpickler makes a table of this many places.
        (b"}r\xff\xff\xff\xff.", "none of eva"),
        (b"}p" + b"9" * 4000 + b"\n.", "none of eva"),
        (b"}\x8a\xff" + b"\x7f" * 255 + b"Ns.", "none of eva"),
    ],
)
def test_bombs_of_few_bytes_cost_little(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match=words):
        LegacyFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e8


def test_opcodes_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl"
    path.write_bytes(b"]" * 2000 + b".")
    with pytest.raises(UserError, match="more opcodes"):
        read_pickle(path, most_reads=1000)
    assert read_pickle(path) == []


def test_every_cut_is_a_user_error(tmp_path: Path) -> None:
    for seed in SEEDS:
        for cut in [*range(0, 400, 7), *range(400, len(seed), 211)]:
            path = tmp_path / "x.pkl"
            path.write_bytes(seed[:cut])
            with pytest.raises(UserError):
                LegacyFile(path)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_mutated_pickles_give_nothing_but_user_errors(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(SEEDS)))
    structure = [i for i in range(len(content)) if i < 600 or i > len(content) - 600]
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(structure)) % len(content)
        kind = data.draw(st.sampled_from(["flip", "insert", "delete", "swap"]))
        if kind == "flip":
            content[place] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
        elif kind == "delete":
            del content[place : place + data.draw(st.integers(1, 9))]
        else:
            content[place : place + 8] = struct.pack("<Q", data.draw(st.integers(0, 2**64 - 1)))
    check_only_user_errors(tmp_path_factory.getbasetemp() / "mutated.pkl", bytes(content))


@settings(max_examples=150, deadline=None)
@given(content=st.lists(st.sampled_from([bytes([i]) for i in range(256)]), max_size=40))
def test_random_opcodes_give_nothing_but_user_errors(
    tmp_path_factory: pytest.TempPathFactory, content: list[bytes]
) -> None:
    check_only_user_errors(tmp_path_factory.getbasetemp() / "random.pkl", b"".join(content))


# Folders


def test_folders_are_read_in_the_seeds_order(tmp_path: Path) -> None:
    for name in ("embeddings_shard_00010_patch_only.pkl", "embeddings_shard_00002_patch_only.pkl"):
        (tmp_path / name).touch()
    (tmp_path / "extraction_checkpoint.pkl").touch()
    numbers = [int(path.stem.split("_")[2]) for path in legacy_files(tmp_path, "auto")]
    assert numbers == [2, 10]
    (tmp_path / "embeddings_shard_00002_cls_patch.pkl").touch()
    with pytest.raises(UserError, match="mode=patch_only or mode=cls_patch"):
        legacy_files(tmp_path, "auto")
    assert len(legacy_files(tmp_path, "cls_patch")) == 1
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no"):
        legacy_files(empty, "auto")
    with pytest.raises(UserError, match="does not exist"):
        legacy_files(tmp_path / "nowhere", "auto")
    (empty / "emergency_checkpoint.pkl").touch()
    assert len(legacy_files(empty, "auto")) == 1


def test_the_manifest_is_compared_with_the_folder(tmp_path: Path) -> None:
    files = [tmp_path / f"embeddings_shard_{i:05d}.pkl" for i in range(3)]
    assert manifest_problems(tmp_path, files, [1, 2, 3]) == []
    shards = [
        {"output_path": f"/old/{f.name}", "total_samples": i + 1} for i, f in enumerate(files)
    ]
    manifest = tmp_path / "embeddings_manifest.json"
    manifest.write_text(json.dumps({"shards": shards, "failed_shards": []}))
    assert manifest_problems(tmp_path, files, [1, 2, 3]) == []
    problems = manifest_problems(tmp_path, files[:2], [1, 5])
    assert problems == [
        "embeddings_shard_00002.pkl is in the manifest, not in the folder",
        "embeddings_shard_00001.pkl holds 5 samples, the manifest says 2",
    ]
    manifest.write_text("[]")
    with pytest.raises(UserError, match="no manifest"):
        manifest_problems(tmp_path, files, [1, 2, 3])
