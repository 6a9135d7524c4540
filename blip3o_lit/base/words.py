"""Words of a command line, `key=value`: written so that Hydra reads back the very value.

Every line that is printed to be pasted takes its words from here, and so does every command that
starts another one.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+-]*")
_KEYWORDS = ("null", "true", "false")


def quoted(text: str) -> str:
    """Return `text` in the quotes of Hydra's grammar; `${...}` stays an interpolation.

    Backslashes are plain in there, but for those before a quote or at the end, which are doubled.
    """
    inner = re.sub(r'(\\*)("|\Z)', lambda end: end[1] * 2 + end[2].replace('"', '\\"'), text)
    return f'"{inner}"'


def override(key: str, value: str | Path) -> str:
    r"""Return `key=value` for an argument list, in Hydra's quotes where the value needs them.

    OmegaConf takes `${` for an interpolation, and backslashes before it for escapes.
    """
    text = re.sub(r"(\\*)\$\{", lambda mark: mark[1] * 2 + "\\${", str(value))
    bare = _PLAIN.fullmatch(text) and text.lower() not in _KEYWORDS and not _is_number(text)
    return f"{key}={text if bare else quoted(text)}"


def pasteable(key: str, value: str | Path) -> str:
    """Return `key=value` as it is typed into a shell."""
    return shlex.quote(override(key, value))


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested dict as one level, keys joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def changes(config: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Yield the overrides that lead from `default` to `config`, two dataclasses of one type."""
    for field in fields(config):
        key, value = f"{prefix}{field.name}", getattr(config, field.name)
        before = getattr(default, field.name)
        if is_dataclass(value):
            yield from changes(value, before, f"{key}.")
        elif value == before:
            continue
        elif isinstance(value, list):
            items = ",".join(override("", item).removeprefix("=") for item in value)
            yield f"{key}=[{items}]"
        elif isinstance(value, str | Path):
            yield override(key, value)
        else:
            yield f"{key}={'null' if value is None else str(value).lower()}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
