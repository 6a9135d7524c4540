"""Shared set-up: no network, a cache folder of the tests' own, small stores and runs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bucket as server
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Runs in this process and in its children are compared bit by bit: sums in one order.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that all tests of a session share, so that demo tokens are built once."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def _own_home(shared_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's cache."""
    monkeypatch.setenv("BLIP3O_HOME", str(shared_home))


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Bucket]:
    with server.serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture
def bucket(_server: server.Bucket, monkeypatch: pytest.MonkeyPatch) -> server.Bucket:
    """A bucket on a real S3 server, whose keys are in the environment."""
    for name, value in _server.variables.items():
        monkeypatch.setenv(name, value)
    return _server


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
