"""The table of the objective's options: none is left out, and the page holds what was measured."""

from __future__ import annotations

import dataclasses
import re
import sys

import pytest
from conftest import ROOT

from blip3o_lit.cli.schema import conf_dir, groups, keys
from blip3o_lit.config.flow import PATHS, PREDICTIONS, FlowConfig
from blip3o_lit.config.train import TrainConfig

sys.path.insert(0, str(ROOT / "scripts"))
from objective_table import BASE, COMMAND, ROWS, SECTIONS, wrapped

WORDS = [word for row in ROWS for word in row.overrides.split()]
FILE = ROOT / "docs" / "objective.md"
PAGE = FILE.read_text("utf-8") if FILE.is_file() else ""
MEASURED = pytest.mark.skipif(not PAGE, reason="scripts/objective_table.py has not written it yet")


def test_every_option_of_the_objective_has_a_row() -> None:
    paths = {word.removeprefix("flow=") for word in WORDS if word.startswith("flow=")}
    assert paths | {"linear"} == set(PATHS)
    outputs = {word.rpartition("=")[2] for word in WORDS if word.startswith("flow.prediction=")}
    assert outputs | {"sample"} == set(PREDICTIONS)
    named = {word.partition("=")[0] for word in WORDS}
    for field in dataclasses.fields(FlowConfig):
        # Paths are options of the group, and what pairs train is measured on docs/solvers.md.
        assert field.name in ("path", "pairs") or f"flow.{field.name}" in named, field.name


def test_every_word_is_an_override() -> None:
    known, options = set(keys(TrainConfig)), groups(conf_dir())
    for word in [*BASE.split(), *WORDS]:
        key, _, value = word.partition("=")
        assert value in options[key] if key in options else key in known, word


@MEASURED
def test_the_page_holds_every_row_and_the_command() -> None:
    assert "\n".join(wrapped(COMMAND)) in PAGE
    lines = [line for line in PAGE.splitlines() if line.startswith("| ")]
    lines = [line for line in lines if not line.startswith("| option")]
    assert len(lines) == len(ROWS)
    assert all(f"## {title}" in PAGE for title in SECTIONS)
    for row, line in zip(ROWS, lines):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == row.what
        assert re.findall(r"`([^`]+)`", cells[1])[: len(row.overrides.split())] == (
            row.overrides.split()
        )
        assert all(re.fullmatch(r"-?\d\.\d+|none|\d+\.\d+", cell) for cell in cells[2:])


@MEASURED
def test_guidance_and_a_later_start_are_shown() -> None:
    assert "`solver.guidance_scale=1.5`" in PAGE
    assert "`solver.start=0.2`" in PAGE
