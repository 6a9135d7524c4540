"""Damaged files and odd words end in a result or in one line: quickly here, for hours in a soak.

`make soak MINUTES=60` shares its minutes among the targets. A case that did harm goes into
`tests/fuzz_cases/TARGET/`, where every later run of the tests feeds it again.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from fuzzing import TARGETS, Target, hunt, refuses_or_takes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_run import make_run

from blip3o_lit.checkpoints.load import load
from blip3o_lit.config.errors import UserError

CASES = ROOT / "tests" / "fuzz_cases"
EXAMPLES = {"config": 20, "evaluation": 12, "checkpoint": 60}
_made: dict[str, Target] = {}


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    name = request.param
    if name not in _made:
        _made[name] = TARGETS[name](tmp_path_factory.mktemp(name))
    return _made[name]


def test_the_cases_to_begin_with_are_sound(target: Target) -> None:
    for seed in target.seeds[:1]:
        target.feed(seed)


def test_damaged_cases_are_refused_in_one_line_or_taken(
    target: Target, request: pytest.FixtureRequest
) -> None:
    name = request.node.callspec.params["target"]

    @settings(
        max_examples=EXAMPLES.get(name, 150),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=True,
    )
    @given(st.sampled_from(range(len(target.seeds))), st.integers(0, 2**48))
    def holds(number: int, seed: int) -> None:
        refuses_or_takes(target, target.damage(target.seeds[number], random.Random(seed)))

    holds()


def test_cases_that_once_did_harm_do_none(target: Target, request: pytest.FixtureRequest) -> None:
    folder = CASES / request.node.callspec.params["target"]
    for case in sorted(folder.glob("*")) if folder.is_dir() else []:
        refuses_or_takes(target, case.read_bytes())


def claims(part: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["blip3o"].update({part: value})


def larger(content: dict[str, Any]) -> None:
    content["blip3o"]["config"]["model"].update(width=2**20, depth=1)


def deeper(content: dict[str, Any]) -> None:
    content["blip3o"]["config"]["model"]["depth"] = 2**40


SIDE = {"grid": [4, 4], "cls": False, "width": 6}


@pytest.mark.parametrize(
    "change",
    [
        *(claims("config", None), claims("config", []), claims("shape", {}), claims("tokens", 1)),
        claims("shape", {"condition": SIDE, "target": {**SIDE, "grid": [2**40, 2**40]}}),
        claims("shape", {"condition": SIDE, "target": {**SIDE, "width": 1e308}}),
        *(larger, deeper, lambda content: content["state_dict"].clear()),
        lambda content: content.update(state_dict=0.5),
        lambda content: content["state_dict"].update({"network.x": None}),
        lambda content: content["blip3o"].pop("config"),
    ],
)
def test_a_checkpoint_that_claims_wrong_or_huge_things_is_refused(
    change: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    file = make_run(tmp_path / "run") / "checkpoints" / "last.ckpt"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"last\.ckpt|shape\.") as error:
        load(file)
    assert "\n" not in str(error.value)
    assert time.monotonic() - began < 10


def test_a_checkpoint_whose_archive_is_odd_is_damaged(tmp_path: Path) -> None:
    file = make_run(tmp_path / "run") / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    entry = whole.index(b"PK\x01\x02")
    for place, byte in ((entry + 6, 255), (entry + 8, 1), (entry + 10, 99), (entry + 46, 255)):
        odd = bytearray(whole)
        odd[place] = byte  # a later version, a password, another compression, a name of no text
        if place == entry + 46:
            odd[entry + 9] |= 8
        file.write_bytes(odd)
        with pytest.raises(UserError, match="damaged"):
            load(file)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_no_case_of_a_long_hunt_does_harm(target: Target, tmp_path: Path) -> None:
    minutes = float(os.environ.get("BLIP3O_SOAK_MINUTES", "60")) / len(TARGETS)
    print(hunt(target, 60 * minutes, tmp_path, random.SystemRandom().getrandbits(32)))
