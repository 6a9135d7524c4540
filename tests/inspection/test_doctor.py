"""doctor: each kind of damage is found and named, sound stores pass, repair keeps what is sound."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from small_store import jpeg, write_store

from blip3o_lit.config.commands import DoctorConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.mode import ModeConfig
from blip3o_lit.doctor import doctor
from blip3o_lit.inspection.finding import Finding
from blip3o_lit.inspection.numbers import HEADER
from blip3o_lit.inspection.repair import repair
from blip3o_lit.inspection.store import inspect
from blip3o_lit.tokens.reading.reader import TokenReader
from blip3o_lit.tokens.reading.token_store import TokenStore
from blip3o_lit.tokens.store import tar
from blip3o_lit.tokens.store.checksums import checksums_of
from blip3o_lit.tokens.store.index import ArraySpec, TokenIndex
from blip3o_lit.tokens.store.int8 import fit_int8
from blip3o_lit.tokens.store.shards import TokenWriter, pack_offsets, unpack_offsets

SPECS = {
    "eva": ArraySpec("tokens", "float16", (17, 6), cls=True, grid=(4, 4)),
    "clip": ArraySpec("tokens", "float16", (16, 5), grid=(4, 4)),
    "text": ArraySpec("text", "float16", (8,)),
}
SHARD_SAMPLES = 4


def samples(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        item = {n: generator.standard_normal(s.shape, np.float32) for n, s in SPECS.items()}
        item["text"] /= np.linalg.norm(item["text"])
        found.append(item)
    return found


def store(folder: Path, train: int = 10, validation: int = 5) -> Path:
    with TokenWriter(folder, SPECS, SHARD_SAMPLES, split_rule="by hand") as writer:
        for number, item in enumerate(samples(train + validation)):
            split = "train" if number < train else "validation"
            caption = f"caption {number}" if number % 5 else ""
            writer.add(split, f"{number:05d}", item, caption=caption)
    return folder


def problems(folder: Path) -> list[Finding]:
    return [finding for finding in inspect(folder).findings if finding.level != "ok"]


def patch_byte(path: Path, place: int, value: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[place] = content[place] ^ 0x55 if value is None else value
    path.write_bytes(content)


def accept_changes(folder: Path) -> None:
    """Make index.json agree with the tars, as if the store had been written this way."""
    data = json.loads((folder / "index.json").read_text())
    for shard in data["shards"]:
        old = shard["sha256"]
        sums = checksums_of(folder / shard["file"])
        shard |= {"sha256": sums.sha256, "crc32": sums.crc32}
        path = folder / shard["offsets"]
        offsets = unpack_offsets(path.read_bytes(), shard["samples"], len(SPECS) + 2, old)
        assert offsets is not None
        path.write_bytes(pack_offsets(offsets, shard["sha256"]))
    (folder / "index.json").write_text(json.dumps(data))


def test_a_sound_store_has_no_findings_and_right_figures(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    inspection = inspect(folder)
    assert {finding.level for finding in inspection.findings} == {"ok"}
    said = " ".join(map(str, inspection.findings))
    assert "15 (10 train, 5 validation), 0 rejected" in said
    assert "80.0% of the samples" in said
    stored = np.stack([item["eva"] for item in samples(15)]).astype(np.float16).astype(np.float64)
    row = dict(zip(HEADER, inspection.numbers["eva"].row("eva")))
    assert row["min"] == f"{stored.min():.4g}"
    assert row["max"] == f"{stored.max():.4g}"
    assert float(row["mean"]) == pytest.approx(stored[:, 1:].mean(), abs=1e-4)
    assert float(row["std"]) == pytest.approx(stored[:, 1:].std(), rel=1e-3)
    norms = np.linalg.norm(stored[:, 1:], axis=-1)
    assert row["token norm"] == f"{norms.mean():.3f} +- {norms.std():.3f}"
    first = np.linalg.norm(stored[:, 0], axis=-1)
    assert row["CLS norm"] == f"{first.mean():.3f} +- {first.std():.3f}"


def int8_store(folder: Path, items: list[dict[str, np.ndarray]]) -> None:
    fitted = {
        name: fit_int8(SPECS[name], np.stack([item[name] for item in items]))
        for name in ("eva", "clip")
    }
    specs = {name: spec for name, (spec, _) in fitted.items()}
    scales = {name: scale_KC for name, (_, scale_KC) in fitted.items()}
    with TokenWriter(folder, specs, SHARD_SAMPLES, scales=scales) as writer:
        for number, item in enumerate(items):
            split = "train" if number < 8 else "validation"
            writer.add(split, f"{number:05d}", {name: item[name] for name in specs})


def test_int8_stores_are_read_through_their_scales(tmp_path: Path) -> None:
    items = samples(12)
    int8_store(tmp_path, items)
    inspection = inspect(tmp_path)
    assert {finding.level for finding in inspection.findings} == {"ok"}
    assert list(inspection.numbers) == ["eva", "clip"]
    true = np.stack([item["clip"] for item in items])
    row = dict(zip(HEADER, inspection.numbers["clip"].row("clip")))
    assert float(row["std"]) == pytest.approx(true.std(), rel=0.01)
    (tmp_path / "scales.safetensors").unlink()
    assert any("scales.safetensors is missing" in f.says for f in problems(tmp_path))


def truncated(folder: Path) -> None:
    path = folder / "train-000001.tar"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def not_a_number(folder: Path) -> None:
    path = folder / "train-000000.tar"
    content = path.read_bytes()
    wanted = samples(15)[2]["clip"].astype("<f2").tobytes()
    patch_byte(path, content.index(wanted) + 1, 0x7E)
    accept_changes(folder)


def no_json(folder: Path) -> None:
    path = folder / "train-000000.tar"
    patch_byte(path, path.read_bytes().index(b'{"caption": "caption 3"'))
    accept_changes(folder)


def wrong_places(folder: Path) -> None:
    path = folder / "train-000000.idx"
    entry = TokenIndex.load(folder).shards[0]
    offsets = unpack_offsets(path.read_bytes(), entry.samples, len(SPECS) + 2, entry.sha256)
    assert offsets is not None
    path.write_bytes(pack_offsets(offsets[::-1].copy(), entry.sha256))


def added(folder: Path, split: str, number: int, key: str) -> None:
    """Write the store again with one more sample, whose tokens are those of `number`."""
    shutil.rmtree(folder)
    with TokenWriter(folder, SPECS, SHARD_SAMPLES) as writer:
        for i, item in enumerate(samples(15)):
            writer.add("train" if i < 10 else "validation", f"{i:05d}", item, caption="x")
        writer.add(split, key, samples(16)[number], caption="x")


def wrong_head(folder: Path) -> None:
    save_file(
        {"eva.projection": torch.randn(9, 4), "clip.projection": torch.randn(5, 4)},
        folder / "heads.safetensors",
        {"eva.norm": "none", "clip.norm": "none"},
    )


DAMAGE: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "truncated": (truncated, "fail", r"train-000001\.tar has \d+ bytes"),
    "flipped byte": (
        lambda f: patch_byte(f / "validation-000000.tar", 2000),
        "fail",
        r"validation-000000\.tar has another sha256",
    ),
    "flipped header": (
        lambda f: patch_byte(f / "train-000002.tar", 3) or accept_changes(f),
        "fail",
        r"train-000002\.tar: broken tar header",
    ),
    "missing shard": (
        lambda f: (f / "train-000001.tar").unlink(),
        "fail",
        r"train-000001\.tar \(4 samples\) can't be read",
    ),
    "missing offsets": (
        lambda f: (f / "train-000001.idx").unlink(),
        "warn",
        r"train-000001\.idx is missing",
    ),
    "damaged offsets": (
        lambda f: patch_byte(f / "train-000001.idx", 40),
        "warn",
        r"train-000001\.idx is damaged",
    ),
    "wrong offsets": (wrong_places, "fail", r"train-000000\.idx points to wrong places"),
    "NaN": (not_a_number, "fail", r"sample 00002 in train-000000\.tar: clip holds NaN"),
    "metadata": (no_json, "fail", r"00003\.json in train-000000\.tar is no JSON"),
    "duplicate key": (
        lambda f: added(f, "train", 15, "00001"),
        "warn",
        r"00001 is in train-000000\.tar and in train-000002\.tar",
    ),
    "duplicate content": (
        lambda f: added(f, "train", 1, "copy"),
        "warn",
        r"00001 in train-000000\.tar and copy in train-000002\.tar hold the same",
    ),
    "leakage": (
        lambda f: added(f, "validation", 1, "copy"),
        "fail",
        r"00001 in train-000000\.tar \(train\) and copy in .* \(validation\) hold the same",
    ),
    "unlisted shard": (
        lambda f: shutil.copy(f / "train-000000.tar", f / "train-000099.tar"),
        "warn",
        r"train-000099\.tar is not in index\.json",
    ),
    "head": (wrong_head, "fail", r"takes 9 channels, tokens have 6"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_named(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, level, words = DAMAGE[name]
    folder = store(tmp_path / "s")
    damage(folder)
    found = problems(folder)
    matching = [f for f in found if re.search(words, f.says)]
    assert matching, found
    assert matching[0].level == level
    if level == "fail":
        with pytest.raises(SystemExit) as ended:
            doctor(DoctorConfig(str(folder)))
        assert ended.value.code == 2
    else:
        assert all(f.level == "warn" for f in found)
        doctor(DoctorConfig(str(folder)))
    assert matching[0].says in capsys.readouterr().out


def test_many_problems_of_one_kind_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    item = samples(1)[0]
    with TokenWriter(folder, SPECS, SHARD_SAMPLES) as writer:
        for number in range(12):
            writer.add("train" if number else "validation", f"{number:05d}", item)
    found = [f for f in problems(folder) if f.what == "split leakage"]
    assert len([f for f in found if f.level == "fail"]) == 5
    assert "6 more like these" in str(found[-1])


def test_outliers_zero_tokens_and_dead_channels_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    with TokenWriter(folder, SPECS, SHARD_SAMPLES) as writer:
        for number, item in enumerate(samples(8)):
            item["eva"][:, 3] *= 40
            item["clip"][:, 2] = 1.0
            item["eva"][5] = 0
            writer.add("train" if number < 6 else "validation", f"{number:05d}", item)
    said = "\n".join(map(str, inspect(folder).findings))
    assert "channels of eva: spread of the largest, in medians: 3 (" in said
    assert "8 tokens of eva are all zero" in said
    assert "1 of 5 channels never change" in said


def reads_all(folder: Path) -> dict[str, torch.Tensor]:
    opened = TokenStore.open(folder, verify="full")
    found = {}
    for split in opened.index.splits:
        reader = TokenReader(opened, split, mode=ModeConfig("patch_only"))
        ids = np.arange(len(reader))
        found.update(zip(reader.keys(ids), reader.read(ids)["target"]))
    return found


def test_repair_keeps_the_sound_shards_and_names_the_lost(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    before = reads_all(folder)
    truncated(folder)
    (folder / "train-000000.idx").unlink()
    shutil.copy(folder / "train-000002.tar", folder / "train-000007.tar")
    patch_byte(folder / "validation-000000.tar", 3000)
    result = repair(folder)
    assert [line.split(" lost")[0] for line in result.lost] == [
        "train-000001.tar: 4 samples",
        "validation-000000.tar: 4 samples",
    ]
    assert result.unlisted == ["train-000007.tar"]
    assert TokenIndex.load(folder).splits == {"train": 8, "validation": 1}
    assert TokenIndex.load(folder).split_rule == "by hand"
    after = reads_all(folder)
    assert set(after) == {"00000", "00001", "00002", "00003", "00008", "00009", "00014"}
    assert all(torch.equal(after[key], before[key]) for key in after)
    assert (folder / "index.json.before-repair").is_file()


def test_thumbnails_are_read_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    write_store(tmp_path, thumbnails=True)
    assert {finding.what for finding in problems(tmp_path)} == {"text"}
    path = tmp_path / "train-000001.tar"
    place = path.read_bytes().index(jpeg(7))
    patch_byte(path, place, 0)
    named = [finding.says for finding in problems(tmp_path) if finding.what == "thumbnail"]
    assert len(named) == 1
    assert "000007: its thumbnail is damaged" in named[0]


def test_repair_without_an_index_finds_the_thumbnails(tmp_path: Path) -> None:
    index = write_store(tmp_path, thumbnails=True)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")}
    (tmp_path / "index.json").unlink()
    repaired = repair(tmp_path)
    assert (repaired.index.thumbnails, repaired.lost) == (True, [])
    assert repaired.index.samples == index.samples
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.idx")} == before


def test_repair_leaves_out_a_tar_without_samples(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    (folder / "train-000009.tar").write_bytes(tar.END)
    assert [line.split(":")[0] for line in repair(folder).lost] == ["train-000009.tar"]
    assert TokenIndex.load(folder).samples == 15


def test_repair_mends_wrong_counts(tmp_path: Path) -> None:
    folder = store(tmp_path / "s")
    data = json.loads((folder / "index.json").read_text())
    data["samples"], data["splits"] = 99, {"train": 99}
    (folder / "index.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="disagree"):
        inspect(folder)
    assert repair(folder).index.samples == 15
    assert problems(folder) == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"shards": 3, "arrays": 4}'])
def test_repair_writes_a_lost_index_again(tmp_path: Path, content: bytes | None) -> None:
    folder = store(tmp_path / "s")
    before = reads_all(folder)
    if content is None:
        (folder / "index.json").unlink()
    else:
        (folder / "index.json").write_bytes(content)
    result = repair(folder)
    assert result.lost == []
    assert result.index.arrays["eva"] == SPECS["eva"]
    assert result.index.arrays["clip"] == SPECS["clip"]
    assert result.index.arrays["text"] == SPECS["text"]
    after = reads_all(folder)
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("scale", ["token", "channel"])
def test_repair_writes_a_lost_int8_index_again(tmp_path: Path, scale: str) -> None:
    items = samples(12)
    for item in items:
        for name in ("eva", "clip"):
            if scale == "channel":  # mostly zeros beside rare equal outliers: no need for tokens'
                item[name][:] = np.sign(item[name]) * (np.abs(item[name]) > 1)
    int8_store(tmp_path, items)
    before, index = reads_all(tmp_path), TokenIndex.load(tmp_path)
    assert index.arrays["eva"].scale == scale
    (tmp_path / "index.json").unlink()
    repaired = repair(tmp_path).index
    for name, spec in index.arrays.items():
        assert repaired.arrays[name] == replace(spec, cosine=None)
    after = reads_all(tmp_path)
    assert all(torch.equal(after[key], before[key]) for key in before)
    (tmp_path / "index.json").unlink()
    (tmp_path / "scales.safetensors").unlink()
    with pytest.raises(UserError, match=r"scales\.safetensors is missing.*eva is int8: restore"):
        repair(tmp_path)


def test_repair_refuses_what_holds_nothing_sound(tmp_path: Path) -> None:
    folder = store(tmp_path / "s", 4, 0)
    patch_byte(folder / "train-000000.tar", 700)
    with pytest.raises(UserError, match="no sound shard"):
        repair(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"no index\.json and no readable shard"):
        repair(empty)
    with pytest.raises(UserError, match="is no folder"):
        repair(tmp_path / "nowhere")


def run(words: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(900)  # three processes import torch, on a machine that may be busy
def test_the_machine_is_checked_without_importing_lightning(tmp_path: Path) -> None:
    script = (
        "import sys; sys.argv = ['doctor']\n"
        "from blip3o_lit.doctor import main\n"
        "main()\n"
        "assert 'lightning' not in sys.modules\n"
    )
    done = run(["-c", script], tmp_path, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:4] in ("ok  ", "warn", "fail")]
    checks = [line[6:].split(":")[0] for line in lines]
    expected = ["python", "lightning", "packages", "torchvision", "cpu", "memory", "cache"]
    assert [name for name in checks if name in expected] == expected
    assert "ok    two processes: gloo all-reduce gives the right sum" in done.stdout
    assert "HF_HUB_OFFLINE: set" in done.stdout


def test_stolen_releases_and_a_foreign_torchvision_are_found_unharmed(tmp_path: Path) -> None:
    for name, version in (("lightning", "2.6.3"), ("torchvision", "0.1")):
        about = tmp_path / f"{name}-{version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        (tmp_path / name).mkdir()
    (tmp_path / "lightning" / "__init__.py").write_text("open('stolen', 'w')\n")
    broken = "raise RuntimeError('operator torchvision::nms does not exist')\n"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    script = (
        "from blip3o_lit.inspection import machine\n"
        "print(*machine.lightning(), *machine.packages(), machine.torchvision(), sep='\\n')\n"
    )
    done = run(["-c", script], tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert "fail  lightning: 2.6.3 is a malicious release" in done.stdout, done.stderr
    assert "fail  torchvision: 0.1 does not work with torch" in done.stdout
    assert "operator torchvision::nms does not exist" in done.stdout
    assert not (tmp_path / "stolen").exists()


def test_wrong_words_exit_with_2_and_one_line(tmp_path: Path) -> None:
    done = run(["-m", "blip3o_lit.doctor", "tokens=nowhere", "--repair"], tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: tokens=nowhere is no folder\n"
    with pytest.raises(UserError, match="no token store at nowhere"):
        doctor(DoctorConfig("nowhere"))
    with pytest.raises(UserError, match="repair=true needs tokens=DIR"):
        DoctorConfig(repair=True)


def test_remote_stores_are_refused() -> None:
    with pytest.raises(UserError, match="copy it first"):
        doctor(DoctorConfig("https://example.org/tokens"))
