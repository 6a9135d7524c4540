"""The one error that a user can cause, and the helpers that make its message useful."""

import difflib
from collections.abc import Collection, Iterable

CLOSE = 0.75
"""From this share of common letters on, a word misspells another: no guess beats a far one."""


class UserError(ValueError):
    """A mistake in the configuration, the data or the environment that the user can mend.

    The message is one line: it names the file, sample or override, and the fix. Commands print it
    without a traceback and exit with its code.
    """

    code = 2


class LostRank(UserError):
    """Another process of the run died or hangs: what no override mends, and another start may."""

    code = 74


def nearest(word: str, options: Iterable[str]) -> str:
    """Return the option that `word` misspells, or an empty string."""
    choices = list(options)
    close = [option for option in choices if sorted(option) == sorted(word)]
    # In a short word one wrong letter is a third of it, too far for the ratio below.
    close += [option for option in choices if _letters_apart(word, option) == 1]
    close += difflib.get_close_matches(word, choices, n=1, cutoff=CLOSE)
    return close[0] if close else ""


def _letters_apart(one: str, other: str) -> int:
    if len(one) != len(other) or len(one) < 3:
        return len(one) + len(other)
    return sum(a != b for a, b in zip(one, other))


def one_of(key: str, value: str, options: Collection[str]) -> None:
    """Raise a UserError that names the nearest option, unless `value` is one of `options`."""
    if value in options:
        return
    choices = list(options)
    guess = nearest(str(value), choices)
    hint = f"did you mean {key}={guess}? " if guess else ""
    raise UserError(f"{key}={value} is not an option: {hint}choose from {', '.join(choices)}")


def positive(key: str, value: float | int | None) -> None:
    """Raise unless `value` is above zero (None, an unset option, passes)."""
    if value is not None and not value > 0:
        raise UserError(f"{key}={value} must be above 0")


def within(key: str, value: float, low: float, high: float) -> None:
    """Raise unless low <= value <= high."""
    if not low <= value <= high:
        raise UserError(f"{key}={value} must be between {low:g} and {high:g}")
