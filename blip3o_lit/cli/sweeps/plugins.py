"""Makes the launchers and the sweeper known to Hydra."""

import sys
from types import ModuleType

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from blip3o_lit.cli.sweeps.launcher import (
    PLUGIN_MODULE,
    ProcessLauncher,
    ProcessLauncherConf,
    SlurmLauncherConf,
)
from blip3o_lit.cli.sweeps.sweeper import OptunaSweeper, OptunaSweeperConf

PLUGIN_GROUPS = {
    "hydra/launcher": ["basic", "process", "slurm"],
    "hydra/sweeper": ["basic", "optuna"],
}


def register_plugins() -> None:
    """Make `hydra/launcher=process`, `hydra/launcher=slurm` and `hydra/sweeper=optuna` known."""
    for plugin in (ProcessLauncher, OptunaSweeper):
        Plugins.instance().register(plugin)
    # Hydra looks plugins up by this name; under it this module stands in for a package.
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    sys.modules[PLUGIN_MODULE] = sys.modules[__name__]
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="process", node=ProcessLauncherConf)
    store.store(group="hydra/launcher", name="slurm", node=SlurmLauncherConf)
    store.store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf)
