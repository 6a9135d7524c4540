"""The rules of docs/architecture.md, read from the sources."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "blip3o_lit"
MIDDLE = {"extraction", "inspection", "scoring", "seeds", "sweeps"}
FOLDERS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}
ROOMS = FOLDERS - MIDDLE
COMMANDS = {"train", "evaluate", "extract", "generate", "convert", "export", "doctor"}


def imports(file: Path) -> Iterator[str]:
    """Yield the dotted name of everything that a file imports, in functions too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)


def own(file: Path) -> Iterator[str]:
    """Yield the part of the package (room or module) of each import of the package's own."""
    for name in imports(file):
        first, _, rest = name.partition(".")
        if first == "blip3o_lit" and rest != "__version__":
            yield rest.partition(".")[0]


def test_rooms_import_only_themselves_and_config() -> None:
    assert {"flow", "models", "tokens", "towers", "metrics", "callbacks", "report"} <= ROOMS
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {part}"
        for room in ROOMS
        for file in (PACKAGE / room).rglob("*.py")
        for part in own(file)
        if part not in (room, "config")
    ]
    assert wrong == []


def test_the_middle_does_not_import_commands() -> None:
    helpers = {"train": set(), "evaluate": {"export.py", "generate.py"}}
    for file in PACKAGE.glob("*.py"):
        for part in set(own(file)) & COMMANDS:
            assert file.stem in COMMANDS, f"{file.name} imports the command {part}"
            assert file.name in helpers.get(part, set())


def test_maths_is_plain_torch_and_config_is_light() -> None:
    for room, banned in (
        ("flow", {"lightning", "hydra", "omegaconf"}),
        ("models", {"lightning", "hydra", "omegaconf"}),
        ("config", {"torch", "lightning", "hydra", "numpy"}),
    ):
        for file in (PACKAGE / room).rglob("*.py"):
            assert not banned & {name.partition(".")[0] for name in imports(file)}, file


def test_no_file_is_long_or_called_utils() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text("utf-8").splitlines()) <= 400, file
        assert file.stem != "utils"


def test_the_map_of_the_house_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    named = set(re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text))
    assert len(named) > 20
    for name in named:
        assert (PACKAGE / name).is_file() or (ROOT / name).is_file(), name
    for room in ROOMS:
        assert f"`{room}/`" in text, f"docs/architecture.md does not name {room}/"
