"""What a folder of generated tokens was begun with, so that it goes on with that and nothing else.

`generate.json` holds all that the tokens are a function of.
"""

from pathlib import Path
from typing import Any

from blip3o_lit.base.files import read_json, write_json
from blip3o_lit.base.words import flatten
from blip3o_lit.config.errors import UserError

SETTINGS_FILE = "generate.json"


def begin(out: Path, settings: dict[str, Any], others: tuple[str, ...]) -> None:
    """Write the settings into a new folder, or refuse one that was begun with others.

    What a killed process left half written there is removed: hold the folder (`files.claimed`).

    Args:
        out: The folder.
        settings: What JSON can hold.
        others: Files that only a folder with settings of its own may have.

    Raises:
        UserError: Names the settings that differ.
    """
    file = out / SETTINGS_FILE
    if not file.is_file():
        for name in others:
            if (out / name).exists():
                raise UserError(f"{out} holds {name} of another command: choose another out=")
    else:
        begun, wanted = flatten(read_json(file, "remove the folder")), flatten(settings)
        if begun.keys() != wanted.keys():
            raise UserError(f"{out} was begun by another command: choose another out=")
        changed = ", ".join(key for key, value in wanted.items() if begun[key] != value)
        if changed:
            raise UserError(f"{out} was begun with another {changed}: choose another out=")
    for leftover in out.rglob(".*.tmp"):
        leftover.unlink()
    write_json(file, settings)
