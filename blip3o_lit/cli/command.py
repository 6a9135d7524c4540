"""The front that all seven commands share: Hydra, a strict typed schema, and one-line errors.

A command is a function from its typed config to a result. Mistakes of the user exit with 2. Hydra
is imported late, so that Ctrl-C is one line at once.
"""

from __future__ import annotations

import io
import os
import string
import sys
import typing
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from blip3o_lit.base.home import adopt_home, refusal
from blip3o_lit.base.launcher import ignore_ranks
from blip3o_lit.base.secrets import masked
from blip3o_lit.cli.interrupt import Kept, interruptible
from blip3o_lit.cli.run_stamp import run_stamp
from blip3o_lit.config.errors import UserError

if TYPE_CHECKING:
    from argparse import Namespace

    from omegaconf import DictConfig

Config = TypeVar("Config")
TOKENS_KEPT = "what is finished is kept: give the same line again to go on"
"""What Ctrl-C leaves of the commands that write tokens."""
RANKED = ("train", "extract")
"""Commands that several processes may run together."""


def run_command(
    name: str,
    schema: type[Config],
    task: Callable[[Config], Any],
    kept: Kept,
    check: Callable[[Config], None] | None = None,
) -> None:
    """Run one command: parse `sys.argv`, compose `conf/<name>.yaml`, call `task`.

    `kept` is what to say after Ctrl-C: what is kept, and how to go on. `check` refuses what a
    dataclass can't see, before anything is made.
    """
    with interruptible(kept):
        _run(name, schema, task, kept, check)


def _run(
    name: str,
    schema: type[Config],
    task: Callable[[Config], Any],
    kept: Kept,
    check: Callable[[Config], None] | None,
) -> None:
    from hydra import main as hydra_main
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from blip3o_lit.cli.arguments import check_arguments
    from blip3o_lit.cli.schema import conf_dir, typed

    began = False

    def job(config: DictConfig) -> Any:
        nonlocal began
        began = True
        try:
            with interruptible(kept):  # Hydra forgets the job's directory before it ends
                return _call(task, typed(config, schema))
        except UserError as error:
            if in_multirun():  # The sweep's other jobs still run; Hydra raises it at their end.
                raise
            fail(str(error), error.code)

    try:
        arguments = _prepare(name, schema)
        if arguments.help:
            _show_help(name, arguments.overrides)
            return
        check_arguments(name, schema, arguments, check)
        hydra_main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    except UserError as error:
        fail(str(error), error.code)
    except BrokenPipeError:  # of a page that was piped into `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (HydraException, OmegaConfBaseException, ValueError) as error:  # of Hydra's own flags
        if began:
            raise
        fail(str(error).strip().splitlines()[0])
    except OSError as error:
        if began:
            raise
        fail(f"{error.filename}: {error.strerror}: choose another folder with hydra.run.dir")


def _prepare(name: str, schema: type[Any]) -> Namespace:
    """Make Hydra and the process ready for a command; return its flags and overrides."""
    from blip3o_lit.cli.arguments import read_line
    from blip3o_lit.cli.own_groups import add_own_groups
    from blip3o_lit.cli.sweeps.plugins import register_plugins

    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    _register(name, schema)
    register_plugins()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # consoles without Unicode, odd names
            stream.reconfigure(errors="backslashreplace")
    adopt_home()
    if name not in RANKED:
        ignore_ranks()
    if "${" in os.getcwd():
        raise UserError(f"{os.getcwd()}: Hydra can't work in a folder with ${{ in its name")
    arguments, sys.argv[1:] = read_line(sys.argv[1:], schema)
    add_own_groups(arguments.config_dir)
    return arguments


def _call(task: Callable[[Config], Any], config: Config) -> Any:
    """Run a command; what the machine refuses (rights, space) is a line like a user's mistake."""
    try:
        return task(config)
    except BrokenPipeError:
        raise
    except OSError as error:
        line = refusal(error, run_directory())
        if line is None:
            raise
        raise UserError(line) from error


def composed(
    name: str, schema: type[Config], words: Iterable[str], config_dir: str | None = None
) -> Config:
    """Return the config that a command line gives, for scripts that run commands themselves."""
    from hydra import compose, initialize_config_dir

    from blip3o_lit.cli.arguments import check_arguments, read_line
    from blip3o_lit.cli.own_groups import add_own_groups
    from blip3o_lit.cli.schema import conf_dir, typed
    from blip3o_lit.cli.sweeps.plugins import register_plugins

    words = list(words)
    if flags := [word for word in words if word.startswith("-")]:
        raise UserError(f"{flags[0]} is a flag of the command line: compose takes key=value")
    _register(name, schema)
    register_plugins()
    add_own_groups(config_dir)
    arguments, _ = read_line(words, schema)
    check_arguments(name, schema, arguments)
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
        return typed(compose(name, overrides=arguments.overrides), schema)


def _register(name: str, schema: type[Any]) -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    # Hydra asks several times for one launch.
    OmegaConf.register_new_resolver("run_stamp", cache(_stamp), replace=True)
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def _stamp() -> str:
    try:
        return run_stamp()
    except UserError as error:
        fail(str(error))  # OmegaConf would wrap the error in its own


def _show_help(name: str, overrides: list[str]) -> None:
    """Print the command's page.

    Hydra's own page lists the groups through copies of all that it knows, which takes a second.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from blip3o_lit.cli.schema import all_groups, conf_dir

    if any("=" not in word for word in overrides):
        raise UserError("--help lists all keys: it takes overrides (key=value), but no names")
    try:
        with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            config = compose(name, overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(str(error).splitlines()[0]) from error
    template = string.Template(config.hydra.help.template)
    options = "".join(f"{key}: {', '.join(names)}\n" for key, names in all_groups().items())
    shown = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    print(template.substitute(APP_CONFIG_GROUPS=options, CONFIG=OmegaConf.to_yaml(shown)))


def fail(message: str, code: int = UserError.code) -> typing.NoReturn:
    """Print a one-line error without secrets and exit."""
    lines = [line.strip() for line in masked(message).splitlines()]
    print("error:", *lines, file=sys.stderr)
    sys.exit(code)


def is_running() -> bool:
    """Whether Hydra has begun a job or a sweep; imports nothing."""
    module = sys.modules.get("hydra.core.hydra_config")
    return module is not None and module.HydraConfig.initialized()


def _hydra() -> Any:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get()


def run_directory() -> Path:
    """Return Hydra's output directory of the running job."""
    return Path(_hydra().runtime.output_dir)


def sweep_directory() -> Path:
    """Return the directory of the running sweep."""
    return Path(str(_hydra().sweep.dir)).absolute()


def in_multirun() -> bool:
    """Whether the running job belongs to a `-m` sweep."""
    return _hydra().mode.name == "MULTIRUN"


def command_line_overrides() -> list[str]:
    """Return the overrides that the running job was given."""
    return list(_hydra().overrides.task)
