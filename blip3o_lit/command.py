"""The front that all seven commands share: Hydra, a strict typed schema, and one-line errors.

A command is a function from its typed config to a result. `run_command` checks the overrides,
composes, merges the result into the dataclasses and calls the function. Mistakes of the user exit
with 2.
"""

from __future__ import annotations

import io
import os
import string
import sys
import typing
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra import main as hydra_main
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from blip3o_lit.arguments import check_arguments
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.home import adopt_home, refusal
from blip3o_lit.config.secrets import masked
from blip3o_lit.launcher import ignore_ranks
from blip3o_lit.schema import Config, conf_dir, groups, typed
from blip3o_lit.sweeps.plugins import register_plugins

USER_ERROR_CODE = 2
RANKED = ("train", "extract")
"""Commands that several processes may run together."""


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
    for stream in (sys.stdout, sys.stderr):
        if isinstance(
            stream, io.TextIOWrapper
        ):  # a console without Unicode, names of other letters
            stream.reconfigure(errors="backslashreplace")
    adopt_home()
    if name not in RANKED:
        ignore_ranks()
    began = False

    def job(config: DictConfig) -> Any:
        nonlocal began
        began = True
        try:
            return _checked(task, typed(config, schema))
        except UserError as error:
            if in_multirun():  # The sweep's other jobs still run; Hydra raises it at their end.
                raise
            fail(str(error))

    # argparse takes no overrides on both sides of a flag: put -m before all of them.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))
    try:
        if _show_help(name, folder):
            return
        check_arguments(name, schema, folder)
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


def _checked(task: Callable[[Config], Any], config: Config) -> Any:
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


def fail(message: str) -> typing.NoReturn:
    """Print a one-line error without secrets and exit with 2."""
    print("error: " + " ".join(masked(message).split()), file=sys.stderr)
    sys.exit(USER_ERROR_CODE)


def run_directory() -> Path:
    """Return Hydra's output directory of the running job."""
    return Path(HydraConfig.get().runtime.output_dir)


def in_multirun() -> bool:
    """Whether the running job belongs to a `-m` sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def command_line_overrides() -> list[str]:
    """Return the overrides that the running job was given."""
    return list(HydraConfig.get().overrides.task)
