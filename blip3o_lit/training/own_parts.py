"""Callbacks and loggers of the user's own, by the `_target_` that stands in the run's config.

That config comes from the command line and the user's files. What a checkpoint or an export says of
its run's callbacks is a record, which nothing instantiates.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from hydra.utils import instantiate
from lightning import Callback
from lightning.pytorch.loggers import Logger

from blip3o_lit.base.secrets import masked
from blip3o_lit.config.errors import UserError, nearest
from blip3o_lit.config.train import TrainConfig

Part = TypeVar("Part", Callback, Logger)
HYDRA_WORDS = ("_target_", "_args_", "_convert_", "_partial_", "_recursive_")
PLAIN = (str, int, float, bool, bytes, torch.Tensor, type(None))


def check_own_parts(config: TrainConfig) -> None:
    """Raise a UserError for a target that is not there or an argument that it does not take."""
    for name, part in config.callbacks.items():
        _check(f"callbacks.{name}", part, Callback)
    for name, part in config.logger.extra.items():
        _check(f"logger.{name}", part, Logger)


def own_callbacks(parts: dict[str, Any]) -> list[Callback]:
    """Return the callbacks that a config names."""
    return [_made(f"callbacks.{name}", part, Callback) for name, part in parts.items()]


def own_loggers(config: TrainConfig, run_dir: Path) -> list[Logger]:
    """Return the loggers that a config names; each has been told the whole config.

    What they write goes into a folder of their name in the run's, unless they are told otherwise.
    """
    loggers = []
    for name, part in config.logger.extra.items():
        _check(f"logger.{name}", part, Logger)
        takes = _parameters(_located(f"logger.{name}", part["_target_"]))
        folder = {"save_dir": str(run_dir / name)} if "save_dir" in takes else {}
        logger = _made(f"logger.{name}", folder | part, Logger)
        try:
            logger.log_hyperparams(masked(asdict(config)))
        except Exception as error:  # of whatever service: no step was taken yet
            raise _refused(f"logger.{name}", "can't start", error) from error
        loggers.append(logger)
    return loggers


def check_plain(states: dict[str, Any]) -> None:
    """Refuse states of callbacks that a checkpoint could not be read with: it holds plain data."""
    for name, state in states.items():
        found = _object_in(state)
        if found is not None:
            raise UserError(
                f"callback {name}: its state holds a {type(found).__name__}: checkpoints take "
                "tensors, numbers, texts, lists and dicts: return those from state_dict"
            )


def _object_in(value: Any) -> Any:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return next((found for found in map(_object_in, value) if found is not None), None)
    return None if isinstance(value, PLAIN) else value


def _check(key: str, part: Any, kind: type) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("_target_"), str):
        raise UserError(f"{key} has no class: give {key}._target_=PACKAGE.CLASS")
    target = _located(key, part["_target_"])
    if inspect.isclass(target) and not issubclass(target, kind):
        raise UserError(f"{key}._target_={part['_target_']} is no {kind.__name__} of Lightning's")
    parameters = _parameters(target)
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values()):
        return
    for name in part:
        if name not in parameters and name not in HYDRA_WORDS:
            guess = nearest(name, parameters)
            hint = f"did you mean {guess}?" if guess else f"it takes {', '.join(parameters)}"
            raise UserError(f"{key}.{name} is no argument of {part['_target_']}: {hint}")


def _parameters(target: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(target).parameters


def _located(key: str, path: str) -> Callable[..., Any]:
    """Return the class that a dotted path names."""
    words = path.split(".")
    for count in range(len(words) - 1, 0, -1):
        module_name = ".".join(words[:count])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if module_name == error.name or module_name.startswith(f"{error.name}."):
                continue
            raise _refused(f"{key}._target_={path}", "can't be imported", error) from error
        except Exception as error:  # whatever the user's own module does
            raise _refused(f"{key}._target_={path}", "can't be imported", error) from error
        for word in words[count:]:
            if not hasattr(found, word):
                guess = nearest(word, dir(found))
                hint = f": did you mean {module_name}.{guess}?" if guess else ""
                raise UserError(f"{key}._target_={path}: {module_name} has no {word}{hint}")
            found = getattr(found, word)
        if callable(found):
            return found
        raise UserError(f"{key}._target_={path} is no class")
    raise UserError(f"{key}._target_={path}: no module {words[0]} is installed or on PYTHONPATH")


def _made(key: str, part: Any, kind: type[Part]) -> Part:
    _check(key, part, kind)
    try:
        made = instantiate(part, _convert_="all")
    except Exception as error:  # whatever the user's own class does
        raise _refused(key, "can't be made", error.__cause__ or error) from error
    if not isinstance(made, kind):
        raise UserError(f"{key}._target_={part['_target_']} is no {kind.__name__} of Lightning's")
    return made


def _refused(key: str, what: str, error: BaseException) -> UserError:
    reason = " ".join(str(error).split())[:300]
    return UserError(f"{key} {what}: {type(error).__name__}: {reason}")
