"""The front that all seven commands share: Hydra, a strict typed schema, and one-line errors.

A command is a function from its typed config to a result. `run_command` checks the overrides before
Hydra sees them (Hydra would advise `+key=...`, which is never right here), composes, merges the
result into the dataclasses and calls the function. Mistakes of the user exit with 2.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import os
import string
import sys
import typing
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Glob,
    IntervalSweep,
    Override,
    OverrideType,
    RangeSweep,
)
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip3o_lit.config.errors import UserError, nearest
from blip3o_lit.config.secrets import masked
from blip3o_lit.sweeps import launcher, study

Config = TypeVar("Config")
USER_ERROR_CODE = 2
MOST_RUNS = 100_000
MOST_TRIED = 64
"""Values of one key that are composed before a sweep starts, to see that they are right."""
OPTIONAL_GROUPS = ("experiment", "debug", "hparams_search")
PLUGIN_GROUPS = {
    "hydra/launcher": ["basic", "process", "slurm"],
    "hydra/sweeper": ["basic", "optuna"],
}


def conf_dir() -> Path:
    """Return the folder of Hydra groups: inside an installed package, else beside it."""
    package = Path(__file__).resolve().parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def run_stamp() -> str:
    """Return a name for a run directory that all ranks of a job agree on and no two runs share."""
    for variable in ("BLIP3O_RUN_STAMP", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        value = os.environ.get(variable, "none")
        if value != "none":
            return value
    stamp = f"{datetime.now():%Y-%m-%d_%H-%M-%S}-{os.getpid()}"
    os.environ["BLIP3O_RUN_STAMP"] = stamp
    return stamp


def run_command(name: str, schema: type[Config], task: Callable[[Config], Any]) -> None:
    """Run one command: parse `sys.argv`, compose `conf/<name>.yaml`, call `task`.

    Args:
        name: The command's word; its defaults stand in `conf/<name>.yaml`.
        schema: The dataclass that types and checks the composed config.
        task: The command itself.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    _register(name, schema)
    register_plugins()
    folder = conf_dir()
    began = False

    def job(config: DictConfig) -> Any:
        nonlocal began
        began = True
        try:
            return task(typed(config, schema))
        except UserError as error:
            if in_multirun():  # The sweep's other jobs still run; Hydra raises it at their end.
                raise
            fail(str(error))

    # argparse takes no overrides on both sides of a flag: put -m before all of them.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    try:
        if _show_help(name, folder):
            return
        _check_arguments(name, schema, folder)
        hydra_main(version_base="1.3", config_path=str(folder), config_name=name)(job)()
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:  # of a page that was piped into `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if began:
            raise
        fail(f"{error.filename}: {error.strerror}: choose another folder with hydra.run.dir")


def composed(name: str, schema: type[Config], words: Iterable[str]) -> Config:
    """Return the config that a command line gives, for scripts that run commands themselves.

    Args:
        name: The command's word.
        schema: Its dataclass.
        words: The overrides.

    Raises:
        UserError: Naming the override, in one line.
    """
    _register(name, schema)
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return typed(compose(name, overrides=list(words)), schema)


def _register(name: str, schema: type[Any]) -> None:
    """Tell Hydra of a command's schema, and OmegaConf how runs are named."""
    OmegaConf.register_new_resolver("run_stamp", run_stamp, replace=True)
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def register_plugins() -> None:
    """Make `hydra/launcher=process`, `hydra/launcher=slurm` and `hydra/sweeper=optuna` known.

    Hydra instantiates plugins of the package `hydra_plugins` only. Registering them under that name
    here serves a checkout, an editable install and a wheel alike.
    """
    plugins = Plugins.instance()
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ImportError:
        namespace = ModuleType("hydra_plugins")
        namespace.__path__ = []
        sys.modules["hydra_plugins"] = namespace
    room = ModuleType(launcher.PLUGIN_MODULE)
    for plugin in (launcher.ProcessLauncher, study.OptunaSweeper):
        setattr(room, plugin.__name__, plugin)
        plugins.register(plugin)
    sys.modules[launcher.PLUGIN_MODULE] = room
    setattr(namespace, launcher.PLUGIN_MODULE.rpartition(".")[2], room)
    launcher.register()
    study.register()


def fail(message: str) -> typing.NoReturn:
    """Print a one-line error without secrets and exit with 2."""
    print("error: " + " ".join(masked(message).split()), file=sys.stderr)
    sys.exit(USER_ERROR_CODE)


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
            raise UserError(_unknown(extra[0], set(keys(schema))))
        return typing.cast(
            Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
        )
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        place = f"{error.full_key}: " if error.full_key else ""
        first_line = str(error.msg or error).splitlines()[0]
        raise UserError(f"{place}{first_line}") from error


def keys(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Yield every override key of a dataclass schema, groups before their members."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        full = prefix + item.name
        yield full
        if dataclasses.is_dataclass(hints[item.name]):
            yield from keys(typing.cast(type, hints[item.name]), full + ".")


def groups(folder: Path) -> dict[str, list[str]]:
    """Return each Hydra group of `conf/` with its options."""
    found = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith((".", "_")):
            found[path.name] = sorted(option.stem for option in path.glob("*.yaml"))
    return found


def _show_help(name: str, folder: Path) -> bool:
    """Print the command's page if --help asks for it; return whether it did.

    Hydra's own page lists the groups through copies of all that it knows, which takes a second.
    """
    arguments, _ = get_args_parser().parse_known_args()
    if not arguments.help:
        return False
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            config = compose(name, overrides=arguments.overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).splitlines()[0]) from error
    template = string.Template(config.hydra.help.template)
    options = "".join(f"{group}: {', '.join(known)}\n" for group, known in groups(folder).items())
    shown = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    print(template.substitute(APP_CONFIG_GROUPS=options, CONFIG=OmegaConf.to_yaml(shown)))
    return True


def _check_arguments(name: str, schema: type[Any], folder: Path) -> None:
    """Check the command line's overrides; composing is tried once, so errors come as one line."""
    arguments, unknown_flags = get_args_parser().parse_known_args()
    if arguments.hydra_help or arguments.shell_completion:
        return
    if unknown_flags:
        raise UserError(f"{unknown_flags[0]} is no flag of this command: overrides are key=value")
    try:
        overrides = OverridesParser.create().parse_overrides(arguments.overrides)
    except HydraException as error:
        bad = next((word for word in arguments.overrides if "=" not in word), "")
        hint = f"{bad!r} is no override: write key=value" if bad else str(error)
        raise UserError(hint) from error
    options = groups(folder) | PLUGIN_GROUPS
    known = set(keys(schema))
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
                raise UserError(_first_line(message, known)) from error
            typed(found, schema)


def _first_line(message: str, known: set[str]) -> str:
    """Return Hydra's message as one line, with the full key that it speaks of."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if "full_key" in line), "")
    return f"{key}: {lines[0]}" if key in known else lines[0]


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
        raise UserError(_unknown(key, known | set(options)))


def _values(override: Override) -> list[Any]:
    """Return the values that an override stands for: one, or each of a sweep's or list's."""
    if override.is_choice_sweep() or override.is_range_sweep():
        return list(override.sweep_iterator())
    value = override.value()
    return list(value) if isinstance(value, list) else [value]


def _unknown(key: str, known: set[str]) -> str:
    """Say that a key does not exist and name the likeliest one."""
    last_word = {name.rsplit(".", 1)[-1]: name for name in sorted(known)}
    guess = nearest(key, known) or last_word.get(nearest(key.rsplit(".", 1)[-1], last_word), "")
    hint = f"did you mean {guess}?" if guess else "--help lists the keys"
    return f"{key} is not a key of this command: {hint}"


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


def run_directory() -> Path:
    """Return Hydra's output directory of the running job."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def in_multirun() -> bool:
    """Whether the running job belongs to a `-m` sweep."""
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get().mode == RunMode.MULTIRUN


def command_line_overrides() -> list[str]:
    """Return the overrides that the running job was given."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)
