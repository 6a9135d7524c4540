"""What scripts/check_gpu.sh compares on a GPU, compared on this CPU, at toy sizes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEVICE", "cpu")
        patch.setenv("SMALL", "1")
        patch.setenv("PYTHONPATH", str(ROOT), prepend=":")
        spec = importlib.util.spec_from_file_location("check_gpu", ROOT / "scripts/check_gpu.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


@pytest.mark.parametrize("part", ["losses", "samples", "scores", "resume", "ranks"])
def test_correctness_parts_run_to_their_end(script: ModuleType, part: str, tmp_path: Path) -> None:
    found = script.CHECKS[part](tmp_path)
    assert found
    if part in ("samples", "scores"):  # the very device that they are held against
        assert set(found.values()) == {0.0}


def test_a_difference_above_its_tolerance_is_named(script: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="^b: not what"):
        script.held({"a": (1e-6, 1e-5), "b": (float("nan"), 1e-5)})
