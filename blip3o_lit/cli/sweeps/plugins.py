"""Makes the launchers and the sweeper known to Hydra."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from blip3o_lit.cli.sweeps import launcher, study

PLUGIN_GROUPS = {
    "hydra/launcher": ["basic", "process", "slurm"],
    "hydra/sweeper": ["basic", "optuna"],
}
NODES = {
    ("hydra/launcher", "process"): launcher.ProcessLauncherConf,
    ("hydra/launcher", "slurm"): launcher.SlurmLauncherConf,
    ("hydra/sweeper", "optuna"): study.OptunaSweeperConf,
}


def register_plugins() -> None:
    """Make `hydra/launcher=process`, `hydra/launcher=slurm` and `hydra/sweeper=optuna` known.

    Hydra instantiates plugins of the package `hydra_plugins` only. Registering them under that name
    here serves a checkout, an editable install and a wheel alike.
    """
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ImportError:
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
        namespace.__path__ = []
    room = sys.modules[launcher.PLUGIN_MODULE] = ModuleType(launcher.PLUGIN_MODULE)
    setattr(namespace, launcher.PLUGIN_MODULE.rpartition(".")[2], room)
    for plugin in (launcher.ProcessLauncher, study.OptunaSweeper):
        setattr(room, plugin.__name__, plugin)
        Plugins.instance().register(plugin)
    for (group, name), node in NODES.items():
        ConfigStore.instance().store(group=group, name=name, node=node, provider="blip3o_lit")
