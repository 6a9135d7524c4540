"""Checks of a command line's overrides, before Hydra sees them.

Hydra would advise `+key=...`, which is never right here; every wrong word gets one line that names
the right one.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
)
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from blip3o_lit.base.words import pasteable
from blip3o_lit.cli.literals import check_word, literal, unreadable
from blip3o_lit.cli.schema import groups, keys, text_keys, typed, unknown_key
from blip3o_lit.cli.sweeps.plugins import PLUGIN_GROUPS
from blip3o_lit.config.errors import UserError, nearest

MOST_RUNS = 100_000
MOST_TRIED = 64
"""Values of one key that are composed before a sweep starts, to see that they are right."""
OPTIONAL_GROUPS = ("experiment", "debug", "hparams_search")


def arranged(words: list[str], schema: type[Any]) -> list[str]:
    """Return a command line with its flags first, as argparse needs it, and its texts for Hydra.

    Raises:
        UserError: For an unknown flag, and for a text that Hydra would read as something else.
    """
    for word in words:
        check_word(word)
    arguments, unknown = flags(words)
    if unknown:
        known = set(keys(schema))
        name, _, value = unknown[0].lstrip("-").partition("=")
        name = name if name in known else name.replace("-", "_")
        hint = f"write {name}={value or 'VALUE'}" if name in known else "overrides are key=value"
        raise UserError(f"{unknown[0]} is no flag of this command: {hint}")
    overrides = list(arguments.overrides)
    texts = set(text_keys(schema))
    literals = [literal(word, texts, arguments.multirun) for word in overrides]
    first = [word for word in words if word not in overrides]
    return first + literals


def flags(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's own flags and the overrides among some words, and the flags it doesn't know.

    Raises:
        UserError: If a flag lacks its value, or has another than it takes.
    """
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        return parser.parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def check_arguments(name: str, schema: type[Any], folder: Path) -> None:
    """Check the command line's overrides; composing is tried once, so errors come as one line."""
    arguments, _ = flags(sys.argv[1:])
    if arguments.hydra_help or arguments.shell_completion:
        return
    options = groups(folder) | PLUGIN_GROUPS
    known = set(keys(schema))
    overrides = [_parsed(word, known | set(options)) for word in arguments.overrides]
    _check_runs(overrides)
    for override in overrides:
        _check_override(override, known, options)
    if not arguments.multirun:
        swept = [override for override in overrides if override.is_sweep_override()]
        swept += [item for item in overrides if item.key_or_group == "hparams_search"]
        if swept:
            raise UserError(
                f"{swept[0].input_line} stands for several runs: add -m to run one job for each"
            )
    with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
        for words in _single_jobs(overrides):
            try:
                found = compose(name, overrides=words)
            except (HydraException, OmegaConfBaseException, ValueError, OverflowError) as error:
                cause = error.__cause__
                message = str(cause) if isinstance(cause, OmegaConfBaseException) else str(error)
                raise UserError(_first_line(message, known) + _dollar(overrides)) from error
            try:
                typed(found, schema)
            except UserError as error:
                raise UserError(f"{error}{_dollar(overrides)}") from error


def _parsed(word: str, known: set[str]) -> Override:
    """Return an override; one that can't be read is refused with the form that can."""
    key, equals, _ = word.lstrip("+").partition("=")
    if not equals and not word.startswith("~"):
        raise UserError(f"{word!r} is no override: write key=value")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        if key not in known and not key.startswith("hydra."):
            raise UserError(unknown_key(key, known)) from error
        raise unreadable(word) from error


def _first_line(message: str, known: set[str]) -> str:
    """Return Hydra's message as one line, with the full key that it speaks of."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), "")
    named = key in known or key.startswith("hydra.")
    return f"{key}: {lines[0]}" if named else lines[0]


def _dollar(overrides: list[Override]) -> str:
    """Return how to type a `${` that is no interpolation, if a value has one."""
    values = [(item.key_or_group, item.value()) for item in overrides]
    marked = [(key, text) for key, text in values if re.search(r"(?<!\\)\$\{", str(text))]
    word = pasteable(marked[0][0], str(marked[0][1])) if marked else ""
    return f"; if ${{...}} is part of a name: {word}" if word else ""


def _check_runs(overrides: list[Override]) -> None:
    """Refuse sweeps of more runs than anybody starts, and those whose values are not named."""
    runs = 1
    for item in overrides:
        value = item.value() if item.is_sweep_override() else None
        if isinstance(value, Glob):
            raise UserError(f"{item.input_line}: name the values one by one, with commas")
        if isinstance(value, RangeSweep):
            runs *= _steps(value)
        elif isinstance(value, ChoiceSweep):
            runs *= max(1, len(value.list))
        if runs > MOST_RUNS:
            raise UserError(
                f"{item.input_line} makes it more than {MOST_RUNS:,} runs: take fewer values"
            )


def _steps(sweep: RangeSweep) -> int:
    """Return how many values a range has, without making them."""
    start, stop, step = (float(number or 0) for number in (sweep.start, sweep.stop, sweep.step))
    count = (stop - start) / step if step else math.inf
    return max(0, math.ceil(count)) if math.isfinite(count) else MOST_RUNS + 1


def _check_override(override: Override, known: set[str], options: dict[str, list[str]]) -> None:
    """Refuse an override of an unknown key, group or option, naming the nearest right word."""
    key = override.key_or_group
    if key.startswith(("hydra.", "hydra/")) and key not in options:
        return
    if key in options and override.type != OverrideType.DEL:
        chosen = _values(override)
        for value in chosen:
            if value is None and key in OPTIONAL_GROUPS:
                continue
            if value not in options[key]:
                guess = nearest(str(value), options[key])
                hint = f"did you mean {key}={guess}? " if guess else ""
                choices = ", ".join(options[key]) or "none"
                raise UserError(f"{key}={value} is not an option: {hint}choose from {choices}")
        return
    if key not in known and key not in options:
        raise UserError(unknown_key(key, known | set(options)))


def _values(override: Override) -> list[Any]:
    """Return the values that an override stands for: one, or each of a sweep's or list's."""
    if override.is_choice_sweep() or override.is_range_sweep():
        return list(override.sweep_iterator())
    value = override.value()
    return list(value) if isinstance(value, list) else [value]


def _single_jobs(overrides: list[Override]) -> Iterator[list[str]]:
    """Yield override lists that try the values of every sweep at least once."""
    plain = [item.input_line or "" for item in overrides if not item.is_sweep_override()]
    swept = [item for item in overrides if item.is_sweep_override()]
    columns = [[f"{item.get_key_element()}={value}" for value in _tried(item)] for item in swept]
    rounds = max((len(column) for column in columns), default=1)
    for index in range(rounds):
        yield plain + [column[index % len(column)] for column in columns]


def _tried(override: Override) -> list[str]:
    """Return the values of a sweep that are tried: the first, or the two ends of an interval."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(islice(override.sweep_string_iterator(), MOST_TRIED))
