"""What scripts/check_gpu.sh compares on a GPU, compared on this CPU, at toy sizes."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE", "cpu")
        patch.setenv("SMALL", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        yield loaded("check_gpu")


@pytest.mark.parametrize("part", ["losses", "samples", "scores", "resume", "ranks"])
def test_correctness_parts_run_to_their_end(script: ModuleType, part: str, tmp_path: Path) -> None:
    found = script.CHECKS[part](tmp_path)
    assert found
    if part in ("samples", "scores"):  # the very device that they are held against
        assert set(found.values()) == {0.0}


def test_a_difference_above_its_tolerance_is_named(script: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="^b: not what"):
        script.held({"a": (1e-6, 1e-5), "b": (float("nan"), 1e-5)})


def test_the_page_has_what_was_found(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ("base_eager", "samplers", "extraction")
    found = {name: script.PARTS[name](tmp_path / name) for name in parts}
    found |= {"machine": script.machine(), "failed": ["nextdit_eager"], "scores": {"mse": 2e-9}}
    file, page, table = tmp_path / "gpu.json", tmp_path / "page.md", loaded("gpu_table")
    file.write_text(json.dumps(found))
    page.write_text(table.PAGE.read_text("utf-8"))
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["gpu_table.py", str(file)])
    table.main()
    once = page.read_text()
    table.main()
    assert page.read_text() == once
    speed = f"| base, eager | 2 | {found['base_eager']['images_per_s']:.1f} |"
    for words in (
        *(
            "1 x CPU, torch",
            "toy sizes: it tests",
            "**Failed or not reached: nextdit_eager.**",
            speed,
        ),
        *("| scores | 2.0e-09 | mse |", "| `base`, heun-10, batch 1 | bare ", "| extraction, "),
    ):
        assert once.count(words) == 1, words
