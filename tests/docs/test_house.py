"""The rules of docs/architecture.md, read from its table and from the sources."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "blip3o_lit"
TEXT = (ROOT / "docs" / "architecture.md").read_text("utf-8")
ORDER = re.findall(r"^\| `([a-z_]+)/` \|", TEXT, flags=re.MULTILINE)
COMMANDS = {"train", "evaluate", "extract", "generate", "convert", "export", "doctor"}
LONGEST = 400


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, in functions too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def parts(file: Path) -> set[str]:
    """Return the rooms and root modules that a file imports."""
    own = (name.split(".") for name in imports(file))
    own = (words for words in own if words[0] == "blip3o_lit" and len(words) > 1)
    return {words[1] for words in own} - {"__version__"}


def test_every_room_stands_in_the_table() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert sorted(ORDER) == sorted(rooms)


def test_rooms_import_only_rooms_above_them_in_the_table() -> None:
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {part}"
        for number, room in enumerate(ORDER)
        for file in (PACKAGE / room).rglob("*.py")
        for part in parts(file) - {*ORDER[: number + 1]}
    ]
    assert wrong == []


def test_the_root_has_commands_that_import_no_other() -> None:
    root = {file.stem for file in PACKAGE.glob("*.py")}
    assert root == COMMANDS | {"inference", "api", "__init__"}
    for name in COMMANDS:
        assert not parts(PACKAGE / f"{name}.py") & COMMANDS, name


def test_maths_is_plain_torch_and_config_is_light() -> None:
    for room, banned in (
        ("flow", {"lightning", "hydra", "omegaconf"}),
        ("models", {"lightning", "hydra", "omegaconf"}),
        ("config", {"torch", "lightning", "hydra", "numpy"}),
    ):
        for file in (PACKAGE / room).rglob("*.py"):
            assert not banned & {name.partition(".")[0] for name in imports(file)}, file


def test_precision_is_interpreted_in_one_place() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if '"bf16_true"' in f.read_text("utf-8")]
    names = sorted(file.relative_to(PACKAGE).as_posix() for file in files)
    assert names == ["config/trainer.py", "models/precision.py"]


def test_names_that_another_room_imports_say_what_they_are() -> None:
    bare = set()
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0]
        for name in imports(file):
            *module, last = name.split(".")
            target = PACKAGE.parent.joinpath(*module).with_suffix(".py")
            if module[:1] != ["blip3o_lit"] or len(module) < 3 or module[1] == room:
                continue
            body = ast.parse(target.read_text("utf-8")).body if target.is_file() else []
            bare |= {
                f"{target.relative_to(PACKAGE)}: {last}"
                for node in body
                if isinstance(node, ast.FunctionDef | ast.ClassDef)
                and node.name == last
                and ast.get_docstring(node) is None
            }
    assert sorted(bare) == []


def test_no_file_is_long_or_called_utils() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text("utf-8").splitlines()) <= LONGEST, file
        assert file.stem != "utils"


def test_test_files_import_no_other_and_lie_in_rooms() -> None:
    for file in (ROOT / "tests").rglob("*.py"):
        assert not [name for name in imports(file) if name.startswith("test_")], file
        assert not file.name.startswith("test_") or file.parent.name in {*ORDER, "docs", "cuda"}, (
            file
        )


def test_the_map_of_the_house_names_files_that_exist() -> None:
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", TEXT))
    assert len(named) > 20
    for name in named:
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name
