"""Makes the launchers and the sweeper known to Hydra."""

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from blip3o_lit.cli.sweeps.launcher import ProcessLauncher, ProcessLauncherConf, SlurmLauncherConf
from blip3o_lit.cli.sweeps.sweeper import OptunaSweeper, OptunaSweeperConf

PLUGIN_GROUPS = {
    "hydra/launcher": ["basic", "process", "slurm"],
    "hydra/sweeper": ["basic", "optuna"],
}


def register_plugins() -> None:
    """Make `hydra/launcher=process`, `hydra/launcher=slurm` and `hydra/sweeper=optuna` known."""
    for plugin in (ProcessLauncher, OptunaSweeper):
        Plugins.instance().register(plugin)
    store = ConfigStore.instance()
    store.store(group="hydra/launcher", name="process", node=ProcessLauncherConf)
    store.store(group="hydra/launcher", name="slurm", node=SlurmLauncherConf)
    store.store(group="hydra/sweeper", name="optuna", node=OptunaSweeperConf)
