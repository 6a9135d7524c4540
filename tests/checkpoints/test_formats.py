"""Files that outlive a process have a version: older ones load, newer ones are refused by name.

A file of a later version is made from a true one by raising its number; one of an earlier version
by taking away what that version did not write.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import pickled
from made_run import make_run
from small_store import write_store

from blip3o_lit.checkpoints import files as checkpointing
from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.commands import ExportConfig
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.errors import UserError
from blip3o_lit.export import export
from blip3o_lit.inference import BLIP3oInference
from blip3o_lit.report.page import write_report
from blip3o_lit.seeds.store import convert
from blip3o_lit.tokens.reading.token_store import TokenStore

TOKENS = torch.zeros(1, 16, 6)


def change_json(path: Path, key: str, value: Any) -> None:
    content = json.loads(path.read_text())
    content[key] = value
    path.write_text(json.dumps(content))


def change_checkpoint(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"


def test_an_older_checkpoint_loads_and_generates_the_same(run: Path) -> None:
    file = run / "checkpoints" / "last.ckpt"
    expected = BLIP3oInference(run, "cpu").generate(TOKENS)

    def age(content: dict[str, Any]) -> None:
        for key in ("evaluation", "logger", "plan"):  # what a later version added
            del content["blip3o"]["config"][key]
        del content["blip3o"]["version"]

    change_checkpoint(file, age)
    assert torch.equal(BLIP3oInference(run, "cpu").generate(TOKENS), expected)


def test_a_newer_checkpoint_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    file = run / "checkpoints" / "last.ckpt"
    newer = checkpointing.FORMAT + 1
    change_checkpoint(file, lambda content: content["blip3o"].update(format=newer))
    with pytest.raises(UserError, match=rf"last\.ckpt: format {newer} is newer .* update"):
        load(run)
    sharded = tmp_path / "last.ckpt"
    sharded.mkdir()
    (sharded / "plain.ckpt").write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=rf"last\.ckpt: format {newer} is newer .* update"):
        checkpointing.read_lazily(sharded)


def test_a_checkpoint_with_keys_of_a_later_version_is_refused_by_name(run: Path) -> None:
    file = run / "checkpoints" / "last.ckpt"
    change_checkpoint(file, lambda content: content["blip3o"]["config"].update(telepathy=True))
    with pytest.raises(UserError, match=r"last\.ckpt: its config is of another version.*telepathy"):
        load(run)


def test_exports_of_older_versions_load_and_of_newer_are_refused(run: Path, tmp_path: Path) -> None:
    out = export(ExportConfig(ckpt=str(run), out=str(tmp_path / "exported")))
    expected = BLIP3oInference(out, "cpu").generate(TOKENS)
    file = out / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in content.items() if k != "format"}))
    assert torch.equal(BLIP3oInference(out, "cpu").generate(TOKENS), expected)
    change_json(file, "format", content["format"] + 1)
    with pytest.raises(UserError, match=r"config\.json: format 2 is newer .* update"):
        load(out)
    change_json(file, "format", "one")
    with pytest.raises(UserError, match=r"config\.json: its format is 'one'"):
        load(out)


def test_stores_of_older_versions_open_and_of_newer_are_refused(store: Path) -> None:
    file = store / "index.json"
    content = json.loads(file.read_text())
    samples = TokenStore.open(store, "full").index.samples
    kept = {k: v for k, v in content.items() if k not in ("created_by", "rejects", "split_rule")}
    file.write_text(json.dumps(kept))
    assert TokenStore.open(store, "full").index.samples == samples
    change_json(file, "schema", content["schema"] + 1)
    with pytest.raises(UserError, match=r"index\.json has the newer schema 2, not 1: update"):
        TokenStore.open(store)


def test_evaluations_of_older_versions_are_shown_and_of_newer_refused(tmp_path: Path) -> None:
    scores = {"mean": {"nfe": 1, "cosine": 0.8125}}
    older = {"split": "validation", "images": 8, "estimators": scores, "verdict": "excellent"}
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(older))
    assert "0.8125" in write_report(tmp_path).read_text("utf-8")
    change_json(file, "format", 2)
    with pytest.raises(UserError, match=r"evaluation\.json: format 2 is newer .* update"):
        write_report(tmp_path)


def test_a_conversion_begun_by_another_version_is_not_gone_on_with(tmp_path: Path) -> None:
    source = pickled(tmp_path / "x.pkl")
    out = tmp_path / "out"
    out.mkdir()
    (out / ".convert.json").write_text('{"fingerprint": {"schema": 99, "files": []}}')
    with pytest.raises(UserError, match="the beginning of another conversion"):
        convert(ConvertConfig(str(source), str(out)))
