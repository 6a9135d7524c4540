"""Fields that say which values they take, and the check of a dataclass against what they say."""

from collections.abc import Callable, Iterable
from dataclasses import field, fields
from functools import partial
from typing import Any

from blip3o_lit.config.errors import UserError, one_of, positive, within


def choice(default: str, options: Iterable[str]) -> Any:
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
