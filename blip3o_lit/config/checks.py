"""Fields that say which values they take, and the check of a dataclass against what they say."""

from collections.abc import Callable, Collection
from dataclasses import field, fields
from functools import partial
from typing import Any

from blip3o_lit.config.errors import UserError, one_of, positive, within


def choice(default: str, options: Collection[str]) -> Any:
    """A field whose value is one of `options`."""
    return _checked(default, partial(one_of, options=options))


def above_zero(default: float | None) -> Any:
    """A field whose value is above zero, or None where that is its default."""
    return _checked(default, positive)


def not_negative(default: float) -> Any:
    """A field whose value is zero or above it."""
    return _checked(default, _refuse_negative)


def between(default: float, low: float, high: float) -> Any:
    """A field whose value lies from `low` to `high`."""
    return _checked(default, partial(within, low=low, high=high))


def several(default: None) -> Any:
    """A field of paths: one, a list of them, or each with its weight."""
    return field(default=default, metadata={"check": paths_of, "several": True})


def paths_of(key: str, value: Any) -> dict[str, float | None]:
    """Return the weight of each path that a field of `several` names; None without weights."""
    if value is None or isinstance(value, str):
        return {value: None} if value else {}
    paths = list(value) if isinstance(value, list | dict) else []
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise UserError(f"{key}={value}: give a folder, '[A,B]' or '{{A: 0.7, B: 0.3}}'")
    if isinstance(value, list):
        return dict.fromkeys(paths)
    for path, weight in value.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            raise UserError(f"{key}: the weight of {path} is {weight}: give a number above 0")
    return {path: float(weight) for path, weight in value.items()}


def named(default: str) -> Any:
    """A field of a name, or of a list of two."""
    return field(default=default, metadata={"check": _check_names, "several": True})


def names_of(value: Any) -> tuple[str, ...]:
    """Return the names in a field of `named`."""
    return (value,) if isinstance(value, str) else tuple(value)


def _check_names(key: str, value: Any) -> None:
    names = [value] if isinstance(value, str) else value if isinstance(value, list | tuple) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{key}={value}: give the name of an array, or '[A,B]'")
    if len(names) > 2 or len(set(names)) < len(names):
        raise UserError(f"{key}={value}: give one grid and one sequence at most, each once")


def check_fields(config: Any, prefix: str = "") -> None:
    """Refuse a config's first wrong value; `prefix` stands before its fields, such as `flow.`."""
    for item in fields(config):
        check = item.metadata.get("check")
        if check is not None:
            check(f"{prefix}{item.name}", getattr(config, item.name))


def _checked(default: Any, check: Callable[[str, Any], None]) -> Any:
    return field(default=default, metadata={"check": check})


def _refuse_negative(key: str, value: float) -> None:
    if not value >= 0:
        raise UserError(f"{key}={value} must not be negative")
