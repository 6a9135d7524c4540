"""Hydra's search path with the groups of installed packages and of `--config-dir`."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from blip3o_lit.cli.schema import OPTION_OF, given_folders, groups, own_folders
from blip3o_lit.config.errors import UserError
from blip3o_lit.config.registry import load_plugins


class OwnGroups(SearchPathPlugin):
    """Adds the folders each time that Hydra makes a search path."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in own_folders():
            search_path.append("blip3o_lit.plugins", f"file://{folder}")


def add_own_groups(config_dir: str | None) -> None:
    """Make the options of other packages and of a folder of the user's known to Hydra."""
    load_plugins()
    given_folders[:] = [] if config_dir is None else [Path(config_dir).expanduser().absolute()]
    for folder in given_folders:
        if not folder.is_dir():
            raise UserError(f"--config-dir {config_dir}: no such folder")
    Plugins.instance().register(OwnGroups)
    files = [groups(folder) for folder in own_folders()]
    for group, (key, registry) in OPTION_OF.items():
        for name in registry.parts:
            if not any(name in folder.get(group, []) for folder in files):
                ConfigStore.instance().store(group=group, name=name, node={key: name})
