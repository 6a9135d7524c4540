"""What the packages bring along: known licences, and an honest word where nothing was looked up."""

from __future__ import annotations

import re
import subprocess
import sys
from email.message import Message
from importlib.metadata import Distribution, requires
from os import environ

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(ROOT / "scripts"))
import audit


def runtime() -> set[str]:
    """Return what `pip install blip3o-lit` installs on this machine."""
    here, found = audit.installed(), set()
    waiting = [("blip3o-lit", "")]
    while waiting:
        name, extra = waiting.pop()
        for line in requires(name) or []:
            wanted = Requirement(line)
            if wanted.marker and not wanted.marker.evaluate({"extra": extra}):
                continue
            key = canonicalize_name(wanted.name)
            more = [(key, extra) for extra in {"", *wanted.extras}]
            if key in here and (key not in found or wanted.extras):
                waiting += more if key not in found else more[1:]
            found.add(key)
    return found & set(here)


def test_every_runtime_dependency_has_a_known_licence() -> None:
    names, said = runtime(), audit.licences()
    assert len(names) > 60
    assert {"torch", "lightning", "wandb", "certifi"} <= names
    assert sorted(names - set(said)) == [], "in requirements.lock"
    assert [name for name in sorted(names) if said[name] == audit.UNKNOWN] == []
    assert not [text for text in said.values() if "GPL" in text]


def test_every_locked_package_has_hashes() -> None:
    for name in audit.LOCKS:
        parts = re.split(r"^(?=\S+==)", (ROOT / name).read_text("utf-8"), flags=re.MULTILINE)
        assert len(parts) > 15
        assert [part.split()[0] for part in parts[1:] if "--hash=sha256:" not in part] == []


def test_the_page_names_every_package_that_is_not_permissive() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    part = page[page.index("## Dependencies") :]
    for name, said in audit.licences().items():
        if not audit.permissive(said):
            family = "nvidia-" if name.startswith("nvidia-") else name
            assert f"`{family}" in part, f"{name}: {said}"


@pytest.mark.parametrize(
    ("fields", "expected", "free"),
    [
        ({"License-Expression": "Apache-2.0 WITH LLVM-exception AND MIT"}, "Apache-2.0 AND MIT", 1),
        ({"License": "BSD 3-Clause License"}, "BSD", 1),
        ({"License": "Apache License, Version 2.0"}, "Apache-2.0", 1),
        ({"License": "GPL-3.0-only OR MIT"}, "GPL-3.0-only OR MIT", 1),
        ({"License": "LGPL-2.1-or-later"}, "LGPL-2.1-or-later", 0),
        ({"License": "MPL-2.0 AND MIT"}, "MPL-2.0 AND MIT", 0),
        ({"License": "Copyright (c) 2001\nAll of it"}, "unknown", 0),
        ({"License": "see file", "Classifier": "License :: OSI Approved :: BSD License"}, "BSD", 1),
        ({"Classifier": "License :: OSI Approved :: GNU Affero General"}, "unknown", 0),
        ({}, "unknown", 0),
    ],
)
def test_licences_are_read_from_metadata(fields: dict, expected: str, free: int) -> None:
    about = Message()
    for name, value in {"Name": "x", **fields}.items():
        about[name] = value

    class Package(Distribution):
        metadata = about  # type: ignore[assignment]

        def read_text(self, filename: str) -> None:
            return None

        def locate_file(self, path: object) -> None:  # type: ignore[override]
            return None

    assert audit.licence(Package()) == expected
    assert audit.permissive(expected) == bool(free)


def test_without_a_network_the_audit_says_so_and_fails() -> None:
    nowhere = {name: "http://127.0.0.1:9" for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")}
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "audit.py")],
        env={**environ, **nowhere, "UV_OFFLINE": "1", "NO_PROXY": "", "no_proxy": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert re.match(r"\d+ locked packages, \d+ of them installed here\n", done.stdout)
    assert re.fullmatch(r"error: (no vulnerability was looked up|pip-audit).+\n", done.stderr)
