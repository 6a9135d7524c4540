"""`hparams_search=optuna`: what a sweep's words say is searched; `study.py` does the search."""

import hashlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from blip3o_lit.base.files import claimed
from blip3o_lit.cli.sweeps.launcher import PLUGIN_MODULE, ProcessLauncher
from blip3o_lit.config.errors import UserError, one_of, positive


@dataclass
class OptunaSweeperConf:
    """`hydra/sweeper=optuna`; `hparams_search=optuna` adds the launcher and a search space."""

    _target_: str = f"{PLUGIN_MODULE}.OptunaSweeper"
    n_trials: int = 20
    """Trials of the study, those of earlier sweeps included: a larger number goes on."""
    seed: int = 0
    """Seed of the sampler."""
    startup_trials: int = 10
    """Random trials before the tree-structured Parzen estimator takes over."""
    pruner: str = "median"
    """median stops trials whose validation cosine is below the median of the earlier ones; none."""
    pruner_startup_trials: int = 5
    """Trials that run to their end before one is stopped."""
    pruner_warmup_steps: int = 0
    """Training steps in which no trial is stopped."""
    study: str | None = None
    """Name of the study and of its folder; null: a hash of what is searched."""
    params: dict[str, str] = field(default_factory=dict)
    """The search space, key by key; a key on the command line replaces its entry."""


class OptunaSweeper(Sweeper):
    __module__ = PLUGIN_MODULE

    def __init__(self, params: DictConfig, **options: Any) -> None:
        self.params, self.options = params, OptunaSweeperConf(**options)

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        one_of("hydra.sweeper.pruner", self.options.pruner, ("median", "none"))
        positive("hydra.sweeper.n_trials", self.options.n_trials)
        self._context, self._config = hydra_context, config
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        if not isinstance(launcher, ProcessLauncher):
            raise UserError("hparams_search=optuna needs hydra/launcher=process (or slurm)")
        self._runner = launcher

    def sweep(self, arguments: list[str]) -> None:
        if importlib.util.find_spec("optuna") is None:
            raise UserError("hparams_search=optuna needs Optuna: pip install 'blip3o-lit[sweep]'")
        from blip3o_lit.cli.sweeps.study import run_study

        words = [f"{key}={value}" for key, value in self.params.items()] + arguments
        overrides = OverridesParser.create(self._context.config_loader).parse_overrides(words)
        by_key = {item.get_key_element(): item for item in overrides}
        space = {key: item for key, item in by_key.items() if item.is_sweep_override()}
        fixed = [
            f"{key}={item.get_value_element_as_str()}"
            for key, item in by_key.items()
            if key not in space
        ]
        if not space:
            raise UserError(
                "nothing to search: give a key a range, for example "
                "optimizer.lr='tag(log,interval(1e-4,1e-2))'"
            )
        own = self.options
        facts = [sorted(str(item.input_line) for item in space.values()), sorted(fixed), own.seed]
        facts += [own.startup_trials, own.pruner, own.pruner_startup_trials]
        facts += [own.pruner_warmup_steps]
        definition = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        with open_dict(self._config):
            self._config.hydra.sweeper.study = own.study or f"optuna-{definition[:8]}"
        folder = Path(str(self._config.hydra.sweep.dir)).absolute()
        with claimed(folder, "hydra.sweep.dir"):
            OmegaConf.save(self._config, folder / "multirun.yaml")
            run_study(folder, definition, space, fixed, own, self._runner)
