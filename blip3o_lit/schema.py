"""What a command takes: the Hydra groups of `conf/` and the keys of its dataclasses."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip3o_lit.config.errors import UserError, nearest

Config = TypeVar("Config")


def conf_dir() -> Path:
    """Return the folder of Hydra groups: inside an installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def groups(folder: Path) -> dict[str, list[str]]:
    """Return each Hydra group of `conf/` with its options."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "_")):
            found[path.name] = sorted(option.stem for option in path.glob("*.yaml"))
    return found


def keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield every override key of a dataclass schema, groups before their members."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        full = prefix + item.name
        yield full
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys(typing.cast(type, hints[item.name]), full + ".")


def typed(config: DictConfig, schema: type[Config]) -> Config:
    """Merge a composed config into its dataclasses, which check types, keys and values.

    Raises:
        UserError: Naming the override, in one line.
    """
    try:
        known = {field.name for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
        plain = OmegaConf.masked_copy(config, [str(key) for key in config if key in known])
        extra = [str(key) for key in config if key not in known]
        if extra:
            raise UserError(unknown_key(extra[0], set(keys(schema))))
        return typing.cast(
            Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
        )
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        place = f"{error.full_key}: " if error.full_key else ""
        first_line = str(error.msg or error).splitlines()[0]
        raise UserError(f"{place}{first_line}") from error


def unknown_key(key: str, known: set[str]) -> str:
    """Say that a key does not exist and name the likeliest one."""
    last_word = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
    guess = nearest(key, known) or last_word.get(nearest(key.rsplit(".", 1)[-1], last_word), "")
    hint = f"did you mean {guess}?" if guess else "--help lists the keys"
    return f"{key} is not a key of this command: {hint}"
