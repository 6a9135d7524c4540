"""Checks of a command line's overrides, before Hydra sees them.

Hydra would advise `+key=...`, which is never right here; every wrong word gets one line that names
the right one.
"""

import argparse
import math
import re
from collections.abc import Callable, Iterator
from itertools import islice
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
from blip3o_lit.cli.schema import (
    all_groups,
    conf_dir,
    keys,
    open_keys,
    several_keys,
    text_keys,
    typed,
    unknown_key,
)
from blip3o_lit.cli.sweeps.plugins import PLUGIN_GROUPS
from blip3o_lit.config.errors import UserError, one_of

MOST_RUNS = 100_000
MOST_TRIED = 64
"""Values of one key that are composed before a sweep starts, to see that they are right."""
OPTIONAL_GROUPS = ("callbacks", "experiment", "debug", "hparams_search")


def read_line(words: list[str], schema: type[Any]) -> tuple[argparse.Namespace, list[str]]:
    """Return Hydra's flags and the overrides of a command line, and the words that Hydra is to see.

    Those have the flags first, as argparse needs it, and texts that Hydra reads as they were typed.
    """
    for word in words:
        check_word(word)
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        arguments, unknown = parser.parse_known_intermixed_args(words)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    if unknown:
        known = set(keys(schema))
        name, _, value = unknown[0].lstrip("-").partition("=")
        name = name if name in known else name.replace("-", "_")
        hint = f"write {name}={value or 'VALUE'}" if name in known else "overrides are key=value"
        raise UserError(f"{unknown[0]} is no flag of this command: {hint}")
    flags = [word for word in words if word not in arguments.overrides]
    texts, many = set(text_keys(schema)), set(several_keys(schema))
    sweep, words = arguments.multirun, [opened(word, schema) for word in arguments.overrides]
    arguments.overrides = [literal(word, texts, sweep, many) for word in words]
    return arguments, flags + arguments.overrides


def opened(word: str, schema: type[Any]) -> str:
    """Return a word that sets a name of the user's own as Hydra takes it: with `++`.

    `logger.NAME.KEY` is a logger of the user's own, which stands in `logger.extra`.
    """
    key, equals, value = word.lstrip("+").partition("=")
    known = set(keys(schema))
    if "logger.extra" in known and key.startswith("logger.") and key.count(".") > 1:
        own = not key.startswith("logger.extra.")
        key = key.replace("logger.", "logger.extra.", 1) if own else key
    return f"++{key}={value}" if equals and is_open(key, schema) else word


def is_open(key: str, schema: type[Any]) -> bool:
    return key.startswith(tuple(f"{place}." for place in open_keys(schema)))


def check_arguments(
    name: str,
    schema: type[Any],
    arguments: argparse.Namespace,
    check: Callable[[Any], None] | None = None,
) -> None:
    """Check a command's overrides; composing is tried once, so errors come as one line.

    `check` looks at a typed config for what dataclasses can't see.
    """
    if arguments.hydra_help or arguments.shell_completion:
        return
    options = all_groups() | PLUGIN_GROUPS
    known = set(keys(schema))
    overrides = [_parsed(word, known | set(options)) for word in arguments.overrides]
    _check_runs(overrides)
    for override in overrides:
        if not is_open(override.key_or_group, schema):
            _check_override(override, known, options)
    if not arguments.multirun:
        swept = [override for override in overrides if override.is_sweep_override()]
        swept += [item for item in overrides if item.key_or_group == "hparams_search"]
        if swept:
            raise UserError(
                f"{swept[0].input_line} stands for several runs: add -m to run one job for each"
            )
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        for words in _single_jobs(overrides):
            try:
                config = typed(compose(name, overrides=words), schema)
                if check is not None:
                    check(config)
            except (HydraException, OmegaConfBaseException, ValueError, OverflowError) as error:
                raise UserError(_one_line(error, known) + _dollar(overrides)) from error


def _parsed(word: str, known: set[str]) -> Override:
    key, equals, _ = word.lstrip("+").partition("=")
    if not equals and not word.startswith("~"):
        raise UserError(f"{word!r} is no override: write key=value")
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException as error:
        if key not in known and not key.startswith("hydra."):
            raise UserError(unknown_key(key, known)) from error
        raise unreadable(word) from error


def _one_line(error: Exception, known: set[str]) -> str:
    """Return an error of composing as one line, with the full key that it speaks of."""
    if isinstance(error, UserError):
        return str(error)
    cause = error.__cause__
    message = str(cause) if isinstance(cause, OmegaConfBaseException) else str(error)
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), "")
    named = key in known or key.startswith("hydra.")
    return f"{key}: {lines[0]}" if named else lines[0]


def _dollar(overrides: list[Override]) -> str:
    """Return how to type a `${` that is no interpolation, if a value has one."""
    for item in overrides:
        text = str(item.value())
        if re.search(r"(?<!\\)\$\{", text):
            return f"; if ${{...}} is part of a name: {pasteable(item.key_or_group, text)}"
    return ""


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
    if key in options and override.type != OverrideType.DEL:
        for value in _values(override):
            if value is not None or key not in OPTIONAL_GROUPS:
                one_of(key, str(value), options[key])
    elif key not in known | set(options) and not key.startswith(("hydra.", "hydra/")):
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
