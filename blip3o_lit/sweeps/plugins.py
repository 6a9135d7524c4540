"""Makes the launchers and the sweeper known to Hydra."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from hydra.core.plugins import Plugins

from blip3o_lit.sweeps import launcher, study

PLUGIN_GROUPS = {
    "hydra/launcher": ["basic", "process", "slurm"],
    "hydra/sweeper": ["basic", "optuna"],
}


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
