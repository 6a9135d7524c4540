"""Every test, command, key and option that docs/parity.md names exists."""

from __future__ import annotations

import ast
import importlib
import re

from conftest import ROOT

from blip3o_lit import BLIP3oInference
from blip3o_lit.command import conf_dir, groups, keys
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.train import TrainConfig

PAGE = (ROOT / "docs" / "parity.md").read_text("utf-8")
KEYS = {key for s in (TrainConfig, EvaluateConfig, ConvertConfig, ExtractConfig) for key in keys(s)}
TESTS = ROOT / "tests"


def rows() -> list[list[str]]:
    """Return the cells of every row: capability, place, proof, fault there."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if row[0] != "capability"]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_every_row_is_whole_and_proved_or_says_that_it_is_not_built() -> None:
    assert len(rows()) > 90
    for row in rows():
        assert len(row) == 4, row
        assert all(row), row
        assert quoted(row[2]) or row[2] == "not built", row
        assert row[2] != "not built" or "not built" in row[1] or "not there" in row[1], row


def test_every_named_test_exists() -> None:
    named = [word for row in rows() for word in quoted(row[2]) if "::" in word]
    assert len(named) > 80
    defined: dict[str, set[str]] = {}
    for word in named:
        file, test = word.split("::")
        if file not in defined:
            tree = ast.parse((TESTS / file).read_text("utf-8"))
            defined[file] = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
        assert test in defined[file], word


def test_every_named_key_option_command_and_file_exists() -> None:
    options = groups(conf_dir())
    for row in rows():
        for word in [*quoted(row[1]), *quoted(row[2])]:
            key, equals, value = word.partition("=")
            if "::" in word:
                continue
            if word.startswith("python -m "):
                assert hasattr(importlib.import_module(word.split()[2]), "main"), word
            elif word.startswith("BLIP3oInference"):
                assert not word.partition(".")[2] or hasattr(BLIP3oInference, word[16:]), word
            elif word.endswith(".py"):
                assert (ROOT / word).is_file() or (ROOT / "blip3o_lit" / word).is_file(), word
            elif equals and key in options:
                assert value in options[key], word
            elif word == "norm_ratio":  # a score, not a key
                continue
            else:
                assert key in KEYS, word


def test_a_wrong_name_would_be_noticed() -> None:
    assert "model.kv_hads" not in KEYS
    assert {"model.kv_heads", "same_data", "split_rule", "extract.shard"} <= KEYS
