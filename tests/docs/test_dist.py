"""What `make dist` builds: an archive that is a whole checkout, a wheel that holds the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

LEFT_OUT = shutil.ignore_patterns(
    *(".venv", ".git", ".cache", ".ci", ".hypothesis", "*_cache", "__pycache__", "*.egg-info"),
    *("build", "dist", "outputs", "multirun", "shared", "site"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy, as `make dist` does."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run(command, cwd=folder / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def tracked() -> set[str]:
    """Return the files of the repository, or of the unpacked archive that this is."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached"]
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = set(listed.stdout.splitlines())
    else:
        copied = [path for path in ROOT.rglob("*") if path.is_file()]
        names = {path.relative_to(ROOT).as_posix() for path in copied}
        names = {
            name for name in names if name.startswith(("conf/", "docs/", "scripts/", "tests/"))
        }
    return {name for name in names if not name.startswith(".ci/") and (ROOT / name).is_file()}


def test_the_source_archive_is_a_whole_checkout(built: Path) -> None:
    (file,) = built.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        members = {name.partition("/")[2] for name in archive.getnames()}
    assert sorted(tracked() - members) == []
    assert {"Makefile", "requirements.lock", "conf/train.yaml", "tests/conftest.py"} <= members
    assert not [name for name in members if "__pycache__" in name]
    assert not [name for name in members if name.startswith((".venv", "outputs", "build/"))]


def test_the_wheel_holds_the_package_and_its_configs_alone(built: Path) -> None:
    (file,) = built.glob("*.whl")
    members = set(zipfile.ZipFile(file).namelist())
    tops = {name.partition("/")[0] for name in members}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"blip3o_lit"}
    for name in tracked():
        inside = name if name.startswith("blip3o_lit/") else f"blip3o_lit/{name}"
        if name.startswith(("blip3o_lit/", "conf/")):
            assert inside in members
