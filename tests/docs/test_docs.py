"""What the pages say is so: commands compose, Python runs, links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from documented import DOCS, FOREIGN, PAGES, blocks, lines
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from picture_run import picture_store, run_on

import blip3o_lit
from blip3o_lit.cli.arguments import check_arguments, read_line
from blip3o_lit.cli.sweeps.plugins import register_plugins
from blip3o_lit.config.commands import DoctorConfig, ExportConfig, GenerateConfig
from blip3o_lit.config.convert import ConvertConfig
from blip3o_lit.config.evaluate import EvaluateConfig
from blip3o_lit.config.extract import ExtractConfig
from blip3o_lit.config.train import TrainConfig
from blip3o_lit.export import export

SCHEMAS = {
    "convert": ConvertConfig,
    "doctor": DoctorConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "extract": ExtractConfig,
    "generate": GenerateConfig,
    "train": TrainConfig,
}
# Pages that scripts write from runs; the site leads to them, a checkout may be without them.
GENERATED = {"objective.md", "peers.md", "results.md"}
# Python blocks that are compiled and whose names are looked up, but not run here.
NOT_RUN = {
    "extending.md": "tests/cli/test_plugins.py installs them as a package",
    "python.md": "tests/docs/test_api.py runs them",
    "migrating.md": "tests/seeds/test_from_seed.py runs them",
    "export.md 1": "tests/checkpoints/test_graph_export.py runs it without the package",
    "text.md": "tests/evaluation/test_words_run.py runs the same on a small run",
    "tutorial.md 1": "needs the demo's towers and a run on their tokens: a minute",
}


def check_overrides(name: str, words: list[str]) -> None:
    """Check a command's words as the command itself does before it starts."""
    words = [word for word in words if word != "..."]
    arguments, _ = read_line(words, SCHEMAS[name])
    check_arguments(name, SCHEMAS[name], arguments)


@pytest.fixture(scope="module", autouse=True)
def _schemas() -> None:
    OmegaConf.register_new_resolver("run_stamp", lambda: "test", replace=True)
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    register_plugins()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_exists_and_composes(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for words in lines(page):
        if words[0] == "make":
            assert [word for word in words[1:] if "=" not in word and word not in targets] == []
        elif words[0] in ("python", "torchrun") and "-m" in words:
            place = words.index("-m") + 1
            room, _, name = words[place].partition(".")
            if room == "blip3o_lit" and name in SCHEMAS:
                check_overrides(name, words[place + 1 :])
            else:  # `python -m benchmarks`, `python -m blip3o_lit.report`
                assert (ROOT / words[place].replace(".", "/") / "__main__.py").is_file(), words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words
        else:
            assert words[0] in FOREIGN, f"{page.name}: why is {words[0]} not checked?"


def test_a_wrong_word_on_a_page_would_be_seen() -> None:
    for wrong in (["modle=tiny"], ["model=tinny"], ["-m", "model=tiny,smal"], ["batch_size=x"]):
        with pytest.raises(blip3o_lit.config.errors.UserError):
            check_overrides("train", wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_compile_and_import_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("blip3o_lit"):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    full = f"{node.module}.{name.name}"
                    assert hasattr(module, name.name) or find_spec(full), f"{page.name}: {full}"


def test_python_blocks_run(
    tmp_path: Path, shared_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_on(picture_store(tmp_path / "store"), tmp_path / "run")
    export(ExportConfig(ckpt=str(run), out="exported"))
    shape = blip3o_lit.BLIP3oInference("exported", "cpu").shape.condition
    ran = 0
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python")):
            if page.name in NOT_RUN or f"{page.name} {number}" in NOT_RUN:
                continue
            names: dict[str, Any] = {"eva_tokens": torch.randn(2, shape.tokens, shape.width)}
            exec(compile(block, f"{page.name} {number}", "exec"), names)  # the page's own text
            ran += 1
    assert ran >= 3
    assert len(list((tmp_path / "photos").glob("*.png"))) == 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target) and Path(target).name not in GENERATED:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for name in re.findall(r"`((?:tests|scripts|notebooks)/[\w/-]+\.\w+)", text):
        assert (ROOT / name).is_file(), f"{page.name} names {name}"


def nav_files(nav: Any) -> Iterator[str]:
    for item in nav if isinstance(nav, list) else [nav]:
        if isinstance(item, str):
            yield item
        else:
            for part in item.values():
                yield from nav_files(part)


def test_the_site_leads_to_every_page() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))
    named = list(nav_files(site["nav"]))
    assert len(named) == len(set(named))
    pages = {page.name for page in DOCS.glob("*.md")} | GENERATED
    assert set(named) == pages, "mend `nav` in mkdocs.yml"


def test_the_configuration_page_names_every_schema() -> None:
    page = (DOCS / "configuration.md").read_text("utf-8")
    named = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    for file in (ROOT / "blip3o_lit" / "config").glob("*.py"):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                assert f"blip3o_lit.config.{file.stem}.{node.name}" in named


def templates() -> list[str]:
    """Return every text of the package's code, with `...` where a value is put in."""
    found = []
    for file in (ROOT / "blip3o_lit").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (getattr(part, "value", None) for part in node.values)
                found.append("".join(part if isinstance(part, str) else "..." for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quoted_message_occurs_in_the_code() -> None:
    page = (DOCS / "troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, re.MULTILINE)
    assert len(quoted) > 40
    texts = templates()
    assert [message for message in quoted if not any(message in text for text in texts)] == []


def test_every_promise_names_a_test_that_exists() -> None:
    page = (DOCS / "reliability.md").read_text("utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| ") and "| shown by |" not in row]
    assert len(rows) > 40
    for row in rows:
        found = re.search(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert found, row
        assert f"\ndef {found[2]}(" in (ROOT / found[1]).read_text("utf-8"), row


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert project["version"] == blip3o_lit.__version__ == citation["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_ci_runs_the_makefile_without_rights() -> None:
    flow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf-8"))
    assert flow["permissions"] == {"contents": "read"}
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    steps = [step for job in flow["jobs"].values() for step in job["steps"]]
    ran = {word for step in steps for word in re.findall(r"make (\w+)", step.get("run", ""))}
    assert {"test", "docs", "dist"} <= ran <= set(targets)
    assert all(re.search(r"@v\d+\.\d+\.\d+$", step["uses"]) for step in steps if "uses" in step)
    versions = flow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
